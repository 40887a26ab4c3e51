// The positives of a ranking loss, ascending by logit, with their windows; what every finalize on the CPU works on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ranking/ranking.h"

namespace rsloss {

// Ranked logits end in NaN: invalid positives and padding.
inline int64_t count_valid(const double* ranked, int64_t capacity) {
  return std::partition_point(ranked, ranked + capacity, [](double logit) { return !std::isnan(logit); }) - ranked;
}

// Breakpoints of `count` ascending centres, all ascending, lo before hi where equal; and the slot of every lo and hi.
struct Breakpoints {
  std::vector<double> edges;     // [2 V], values of T
  std::vector<int32_t> lo_slot;  // [V], and one entry that the merge may write
  std::vector<int32_t> hi_slot;  // likewise
};

// A breakpoint beyond the largest finite T is moved there, so that differences to it stay finite.
template <class T>
double breakpoint(double centre, double shift) {
  const T edge = round_up_sum<T>(centre, shift);
  return edge < std::numeric_limits<T>::max() ? edge : std::numeric_limits<T>::max();
}

// The merge has no branch that depends on the data: it writes both slots and steps over one.
template <class T>
Breakpoints merge_breakpoints(const double* centre, int64_t count, double delta) {
  Breakpoints merged{std::vector<double>(2 * count), std::vector<int32_t>(count + 1), std::vector<int32_t>(count + 1)};
  std::vector<double> lo(count + 1), hi(count + 1);
  for (int64_t i = 0; i < count; ++i) {
    lo[i] = breakpoint<T>(centre[i], -delta);
    hi[i] = breakpoint<T>(centre[i], delta);
  }
  lo[count] = hi[count] = std::numeric_limits<double>::infinity();
  int64_t next_lo = 0, next_hi = 0;
  for (int32_t slot = 0; slot < 2 * count; ++slot) {
    const bool takes_lo = lo[next_lo] <= hi[next_hi];
    merged.edges[slot] = takes_lo ? lo[next_lo] : hi[next_hi];
    merged.lo_slot[next_lo] = merged.hi_slot[next_hi] = slot;
    next_lo += takes_lo;
    next_hi += !takes_lo;
  }
  return merged;
}

struct Windows {
  const double* centre;  // [V] ascending
  int64_t count;         // V
  double delta;
  Breakpoints breakpoints;
  std::vector<int32_t> lower;     // [V] first rank with s >= lo_i
  std::vector<int32_t> upper;     // [V] first rank with s >= hi_i
  std::vector<int32_t> full_end;  // [V] ranks below have H(s_i - s_j) = 1
  std::vector<double> offset;     // [V] s_i - the first centre of its cluster
};

template <class T>
Windows make_windows(const double* centre, int64_t count, double delta) {
  Windows windows{centre,
                  count,
                  delta,
                  merge_breakpoints<T>(centre, count, delta),
                  std::vector<int32_t>(count),
                  std::vector<int32_t>(count),
                  {},
                  std::vector<double>(count)};
  const Breakpoints& points = windows.breakpoints;
  int32_t lower = 0, upper = 0;
  double cluster = 0;
  for (int64_t i = 0; i < count; ++i) {
    while (lower < count && centre[lower] < points.edges[points.lo_slot[i]]) ++lower;
    while (upper < count && centre[upper] < points.edges[points.hi_slot[i]]) ++upper;
    windows.lower[i] = lower;
    windows.upper[i] = upper;
    // Exactly i windows were opened before this one; a cluster starts where as many were closed.
    const int64_t closed_before = points.lo_slot[i] - i;
    if (closed_before == i) cluster = centre[i];
    windows.offset[i] = centre[i] - cluster;
  }
  windows.full_end = windows.lower;
  if (delta == 0) {
    int32_t end = 0;
    for (int64_t i = 0; i < count; ++i) {
      while (end < count && centre[end] <= centre[i]) ++end;
      windows.full_end[i] = end;
    }
  }
  return windows;
}

// FP_i of every positive. counts, sums: the rows of `bins`; unit: of the fixed-point sums. Returns [V].
inline std::vector<double> false_positives(const Windows& windows, const int64_t* counts, const int64_t* sums, double unit) {
  const int64_t slots = 2 * windows.count;
  const Breakpoints& points = windows.breakpoints;
  // Right of slot k: negatives at or above it, and the moment of the covered bins before it, from the origin of its cluster.
  std::vector<int64_t> from_slot(slots + 1, 0);
  for (int64_t slot = slots; slot-- > 0;) from_slot[slot] = from_slot[slot + 1] + counts[slot + 1];
  std::vector<double> moment(slots + 1, 0), origin(windows.count, 0);
  double cluster = 0;
  int64_t open = 0, next_lo = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (open == 0) {
      cluster = points.edges[slot];
      moment[slot] = 0;
    }
    const bool is_lo = next_lo < windows.count && points.lo_slot[next_lo] == slot;
    if (is_lo) origin[next_lo++] = cluster;
    open += is_lo ? 1 : -1;
    const double gained = open > 0 ? static_cast<double>(sums[slot + 1]) * unit +
                                         static_cast<double>(counts[slot + 1]) * (points.edges[slot] - cluster)
                                   : 0;
    moment[slot + 1] = moment[slot] + gained;
  }
  std::vector<double> result(windows.count);
  for (int64_t i = 0; i < windows.count; ++i) {
    const int32_t lo = points.lo_slot[i], hi = points.hi_slot[i];
    result[i] = false_positives(static_cast<double>(from_slot[hi]), static_cast<double>(from_slot[lo] - from_slot[hi]),
                                moment[hi] - moment[lo], windows.centre[i] - origin[i], windows.delta);
  }
  return result;
}

// Fills `lines` [3, columns]: the gradient of a negative, sum_i c_i H(s - s_i). coefficient: [V].
inline void write_lines(const Windows& windows, const double* coefficient, double* lines, int64_t columns) {
  double *edge = lines, *value = lines + columns, *slope = lines + 2 * columns;
  const Breakpoints& points = windows.breakpoints;
  const int64_t slots = 2 * windows.count;
  double closed = 0, opened = 0, moment = 0, cluster = 0;
  int64_t open = 0, next_lo = 0, next_hi = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (open == 0) {
      cluster = points.edges[slot];
      opened = moment = 0;
    }
    const bool is_lo = next_lo < windows.count && points.lo_slot[next_lo] == slot;
    const int64_t i = is_lo ? next_lo++ : next_hi++;
    const double sign = is_lo ? 1 : -1;
    open += is_lo ? 1 : -1;
    opened += sign * coefficient[i];
    moment += sign * coefficient[i] * (windows.centre[i] - cluster);
    if (!is_lo) closed += coefficient[i];
    if (open == 0) opened = moment = 0;
    edge[slot] = points.edges[slot];
    value[slot] = line_value(closed, opened, moment, points.edges[slot] - cluster, windows.delta);
    slope[slot] = windows.delta > 0 ? opened / (2 * windows.delta) : 0;
  }
  for (int64_t slot = slots; slot < columns; ++slot) {
    edge[slot] = std::numeric_limits<double>::infinity();
    value[slot] = closed;
    slope[slot] = 0;
  }
}

}  // namespace rsloss
