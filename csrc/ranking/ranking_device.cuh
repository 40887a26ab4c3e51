// Device side of the ranking sweep that the losses' own kernels share: valid positives, windows over bins, lines of the
// gradient.
#pragma once

#include "common/cuda_device.cuh"
#include "ranking/ranking.h"
#include "ranking/ranking_kernels.cuh"

namespace rsloss {

// Columns of `positives` and `ranked` that hold a record; the rest is padding.
__device__ __forceinline__ int used_columns(const int64_t* counts, int64_t capacity) {
  return static_cast<int>(counts[kFound] < capacity ? counts[kFound] : capacity);
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

// FP of positive i by one warp, the same in every lane. It sums over the bins of the window itself, terms of one sign, so it
// needs neither prefix sums nor their origins.
template <class T>
__device__ __forceinline__ double window_false_positives(double centre, int i, Breakpoints<T> breakpoints,
                                                         const int64_t* from_slot, const int64_t* bins, int64_t capacity,
                                                         double unit, double delta) {
  const int lo = breakpoints.lo_slot[i];
  const int hi = breakpoints.hi_slot[i];
  const double origin = breakpoints.edges[lo];
  // The bin right of edge k is bin k + 1.
  const int64_t* count = bins + 1;
  const int64_t* fixed = bins + (2 * capacity + 1) + 1;
  double moment = 0;
  for (int k = lo + threadIdx.x % kWarp; k < hi; k += kWarp) {
    moment += static_cast<double>(fixed[k]) * unit +
              static_cast<double>(count[k]) * (static_cast<double>(breakpoints.edges[k]) - origin);
  }
  moment = warp_sum(moment);
  const double inside = static_cast<double>(from_slot[lo] - from_slot[hi]);
  return false_positives(static_cast<double>(from_slot[hi]), inside, moment, centre - origin, delta);
}

// The line right of one edge by one warp: `closed` = sum of c_i with hi_i at or left of the edge, and the positives [open,
// open_end) whose windows hold it. coefficient: c_i. lines f64 [3, 2 capacity].
template <class T>
__device__ __forceinline__ void write_line(const double* centre, const double* coefficient, double closed, int open,
                                           int open_end, T edge, int slot, double delta, int64_t capacity, double* lines) {
  double opened = 0;
  double moment = 0;
  for (int i = open + threadIdx.x % kWarp; i < open_end; i += kWarp) {
    opened += coefficient[i];
    moment += coefficient[i] * (centre[i] - static_cast<double>(edge));
  }
  opened = warp_sum(opened);
  moment = warp_sum(moment);
  if (threadIdx.x % kWarp == 0) {
    lines[kBreakpoint * 2 * capacity + slot] = edge;
    lines[kValue * 2 * capacity + slot] = line_value(closed, opened, moment, 0, delta);
    lines[kSlope * 2 * capacity + slot] = delta == 0 ? 0 : opened / (2 * delta);
  }
}

// Both lines of positive i by one warp. closed f64 [capacity + 1]: sum of c over the positives before i. Left of lo_i lie
// lo_slot - i closed windows, left of or at hi_i the windows 0..i are closed and hi_slot - i have opened.
template <class T>
__device__ __forceinline__ void write_lines_of(int i, const double* centre, const double* coefficient, const double* closed,
                                               Breakpoints<T> breakpoints, double delta, int64_t capacity, double* lines) {
  const int lo = breakpoints.lo_slot[i];
  const int hi = breakpoints.hi_slot[i];
  write_line(centre, coefficient, closed[lo - i], lo - i, i + 1, breakpoints.edges[lo], lo, delta, capacity, lines);
  write_line(centre, coefficient, closed[i + 1], i + 1, hi - i, breakpoints.edges[hi], hi, delta, capacity, lines);
}

}  // namespace rsloss
