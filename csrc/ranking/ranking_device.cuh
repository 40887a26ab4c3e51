// Device side of what all stages of the ranking sweep share: used columns, padding, searches, segments of ranked positives.
#pragma once

#include "common/cuda_device.cuh"
#include "ranking/ranking.h"
#include "ranking/ranking_kernels.cuh"

namespace rsloss {

// Columns of `positives` and `ranked` that hold a record; the rest is padding.
__device__ __forceinline__ int used_columns(const int64_t* counts, int64_t capacity) {
  return static_cast<int>(counts[kFound] < capacity ? counts[kFound] : capacity);
}

__device__ __forceinline__ void write_padding(double* records, int64_t column, int64_t capacity) {
  records[kLogit * capacity + column] = NAN;
  records[kQuality * capacity + column] = 0;
  records[kSegment * capacity + column] = 0;
  records[kIndex * capacity + column] = -1;
}

// Index of the first entry for which `is_right` holds, `count` if none; false entries come first.
template <class Predicate>
__device__ __forceinline__ int partition_point(int count, Predicate is_right) {
  int low = 0;
  int high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (is_right(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// V, the ranked positives with a finite logit: those that are not (NaN) stand behind them.
__device__ __forceinline__ int valid_positives(const double* ranked, const int64_t* counts, int64_t capacity) {
  return partition_point(used_columns(counts, capacity), [=](int i) { return isnan(ranked[i]); });
}

// V, once launch_breakpoints has run.
__device__ __forceinline__ int valid_positives(const SegmentTable& segments) { return segments.offsets[segments.count]; }

struct Span {
  int first;
  int last;
};

// Ranks of the valid positives in the segment of the one of rank i. Whatever `ranked` holds, it is no address.
__device__ __forceinline__ Span segment_span(const double* ranked, int64_t capacity, const SegmentTable& segments, int i) {
  const double segment = ranked[kSegment * capacity + i];
  const int id = segment > 0 ? (segment < segments.count ? static_cast<int>(segment) : segments.count - 1) : 0;
  return {segments.offsets[id], segments.offsets[id + 1]};
}

// The unit of the bins' sums, by the elements of all processes. T: of the arithmetic. `widest`: fixed_point_unit(delta, 0), a
// power of two, so that dividing it is exact.
template <class T>
struct FixedPoint {
  double unit;
  double scale;  // 1 / unit, 0 for delta = 0
  double most;   // largest offset

  __device__ __forceinline__ FixedPoint(double widest, const int64_t* counts) {
    const double parts = static_cast<double>(int64_t{1} << fixed_point_bits(counts[kElements], sizeof(T) == sizeof(double)));
    unit = widest / parts;
    scale = widest > 0 ? parts / widest : 0;
    most = parts - 1;
  }
};

}  // namespace rsloss
