// The breakpoints of ranked positives, on the device.
#pragma once

#include "ranking/ranking_device.cuh"

namespace rsloss {

// By thread `thread` of `threads`: a merge by ranks, where the place of lo_i is i plus the hi before it, and the other way
// round. Equal: lo first. Reads log2(V) cached doubles per positive, writes 8 + 2 sizeof(T) bytes. Without segments it writes
// their table too; with them it has been written, but for the holders, which are 0.
template <class T, bool kSegmented>
__device__ __forceinline__ void write_breakpoints(const double* ranked, const int64_t* counts, int64_t capacity, double delta,
                                                  const Breakpoints<T>& breakpoints, int thread, int threads) {
  const SegmentTable& segments = breakpoints.segments;
  const int valid = kSegmented ? segments.offsets[segments.count] : valid_positives(ranked, counts, capacity);
  if (!kSegmented && thread == 0) {
    segments.offsets[0] = 0;
    segments.offsets[1] = valid;
    *segments.holders = valid > 0 ? 1 : 0;
  }
  for (int i = thread; i < valid; i += threads) {
    const Span span = kSegmented ? segment_span(ranked, capacity, segments, i) : Span{0, valid};
    if (kSegmented && i == span.first) atomicAdd(segments.holders, 1);
    const double* const logit = ranked + span.first;
    const int count = span.last - span.first;
    const T lo = round_up_sum<T>(ranked[i], -delta);
    const T hi = round_up_sum<T>(ranked[i], delta);
    const int base = span.first + i;
    const int lo_slot = base + partition_point(count, [=](int j) { return round_up_sum<T>(logit[j], delta) >= lo; });
    const int hi_slot = base + partition_point(count, [=](int j) { return round_up_sum<T>(logit[j], -delta) > hi; });
    breakpoints.edges[lo_slot] = lo;
    breakpoints.edges[hi_slot] = hi;
    breakpoints.lo_slot[i] = lo_slot;
    breakpoints.hi_slot[i] = hi_slot;
  }
}

}  // namespace rsloss
