// The positives of a ranking loss, ascending by logit inside their segments, with their windows; what every finalize on the CPU
// works on.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "ranking/ranking.h"

namespace rsloss {

// The valid positives of a segment that has any: ranks [begin, end).
struct SegmentRange {
  int64_t segment;
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

// Ranked logits end in NaN: invalid positives and padding.
inline int64_t count_valid(const double* ranked, int64_t capacity) {
  return std::partition_point(ranked, ranked + capacity, [](double logit) { return !std::isnan(logit); }) - ranked;
}

// segment: [count] ascending; what follows the first one that is not, or not below num_segments, is left out.
inline std::vector<SegmentRange> segment_ranges(const double* segment, int64_t count, int64_t num_segments) {
  std::vector<SegmentRange> ranges;
  double last = 0;
  for (int64_t i = 0; i < count && segment[i] >= last && segment[i] < static_cast<double>(num_segments); ++i) {
    if (ranges.empty() || segment[i] != last) ranges.push_back({static_cast<int64_t>(segment[i]), i, i});
    last = segment[i];
    ranges.back().end = i + 1;
  }
  return ranges;
}

// Ranks of all ranges.
inline int64_t count_ranks(const std::vector<SegmentRange>& ranges) { return ranges.empty() ? 0 : ranges.back().end; }

inline int64_t largest_range(const std::vector<SegmentRange>& ranges) {
  int64_t largest = 0;
  for (const SegmentRange& range : ranges) largest = std::max(largest, range.size());
  return largest;
}

// Breakpoints of the ascending centres of every segment, ascending, and the slot of every lo and hi. Where equal hi stands
// before lo: windows that only touch have nothing in common. For delta = 0 they have no width, and each must open before it
// closes: lo before hi. Ranks [a, b) have the slots [2a, 2b).
struct Breakpoints {
  std::vector<double> edges;     // [2 V], values of T; +inf for a hi beyond the largest finite one
  std::vector<int32_t> lo_slot;  // [V], and one entry that the merge may write
  std::vector<int32_t> hi_slot;  // likewise
  double largest;                // finite T

  // For differences, which must be finite. Nothing finite lies between this and an infinite edge.
  double finite_edge(int64_t slot) const { return std::min(edges[slot], largest); }
};

// The smallest finite value of T that is >= centre + shift, or +inf. A centre that is NaN, as no ranked one is, gives a number.
template <class T>
double breakpoint(double centre, double shift) {
  return std::max(std::numeric_limits<T>::lowest(), round_up_sum<T>(centre, shift));
}

struct Windows {
  const double* centre;              // [V] ascending inside a segment
  std::vector<SegmentRange> ranges;  // of segments with a valid positive
  int64_t count;                     // V
  double delta;
  double slope;  // 1 / (2 delta); 0 for delta = 0
  Breakpoints breakpoints;
  std::vector<int32_t> lower;     // [V] first rank of the segment with s >= lo_i; and one entry that the merge may write
  std::vector<int32_t> upper;     // [V] first rank with s >= hi_i; likewise
  std::vector<int32_t> full_end;  // [V] ranks of the segment below have H(s_i - s_j) = 1
  std::vector<double> offset;     // [V] s_i - the first centre of its cluster
};

// The ascending values of one segment, `count` of each, and one more that ends them: NaN behind the last lo, +inf behind the
// last hi and the last centre.
struct WindowEnds {
  explicit WindowEnds(int64_t largest) : lo(largest + 1), hi(largest + 1), centre(largest + 1) {}

  template <class T>
  void fill(const double* centres, int64_t size, double delta) {
    constexpr double kLargest = std::numeric_limits<T>::max();
    for (int64_t i = 0; i < size; ++i) {
      lo[i] = std::min(breakpoint<T>(centres[i], -delta), kLargest);
      hi[i] = breakpoint<T>(centres[i], delta);
      centre[i] = std::min(centres[i], kLargest);  // none is larger, but for a table that no operator wrote
    }
    lo[size] = std::numeric_limits<double>::quiet_NaN();
    hi[size] = centre[size] = std::numeric_limits<double>::infinity();
    count = size;
  }

  int64_t count = 0;
  std::vector<double> lo;
  std::vector<double> hi;
  std::vector<double> centre;
};

// Merges lo with hi, centres with lo and centres with hi: three chains side by side, none of which waits for the others. No
// branch depends on the data: what both values of a step might get is written, and one of them is stepped over. What ends the
// values is never taken as long as others are left.
template <class IsNext>
void merge_segment(const WindowEnds& ends, const IsNext& lo_is_next, int32_t first, Windows& windows) {
  Breakpoints& points = windows.breakpoints;
  double* edges = &points.edges[2 * int64_t{first}];
  int32_t *lo_slot = &points.lo_slot[first], *hi_slot = &points.hi_slot[first];
  int32_t *lower = &windows.lower[first], *upper = &windows.upper[first];
  int64_t next_lo = 0, next_hi = 0, below_lo = 0, lo_done = 0, below_hi = 0, hi_done = 0;
  for (int64_t step = 0; step < 2 * ends.count; ++step) {
    const double lo = ends.lo[next_lo], hi = ends.hi[next_hi];
    // No window closes before it opens, whatever a table holds that no operator wrote.
    const bool takes_lo = next_lo == next_hi || lo_is_next(lo, hi);
    edges[step] = takes_lo ? lo : hi;
    lo_slot[next_lo] = hi_slot[next_hi] = static_cast<int32_t>(2 * int64_t{first} + step);
    next_lo += takes_lo;
    next_hi += !takes_lo;

    const bool is_below_lo = !(ends.centre[below_lo] >= ends.lo[lo_done]);
    lower[lo_done] = static_cast<int32_t>(first + below_lo);
    below_lo += is_below_lo;
    lo_done += !is_below_lo;

    const bool is_below_hi = !(ends.centre[below_hi] >= ends.hi[hi_done]);
    upper[hi_done] = static_cast<int32_t>(first + below_hi);
    below_hi += is_below_hi;
    hi_done += !is_below_hi;
  }
}

template <class T>
Windows make_windows(const double* centre, std::vector<SegmentRange> ranges, double delta) {
  const int64_t count = count_ranks(ranges);
  Windows windows{centre,
                  std::move(ranges),
                  count,
                  delta,
                  delta > 0 ? 1 / (2 * delta) : 0,
                  {std::vector<double>(2 * count), std::vector<int32_t>(count + 1), std::vector<int32_t>(count + 1),
                   std::numeric_limits<T>::max()},
                  std::vector<int32_t>(count + 1),
                  std::vector<int32_t>(count + 1),
                  {},
                  std::vector<double>(count)};
  WindowEnds ends(largest_range(windows.ranges));
  for (const SegmentRange& range : windows.ranges) {
    ends.fill<T>(centre + range.begin, range.size(), delta);
    if (delta > 0) merge_segment(ends, std::less<>{}, static_cast<int32_t>(range.begin), windows);
    else merge_segment(ends, std::less_equal<>{}, static_cast<int32_t>(range.begin), windows);
    double cluster = 0;
    for (int64_t i = range.begin; i < range.end; ++i) {
      // Exactly i windows were opened before this one; a cluster starts where as many were closed.
      const int64_t closed_before = windows.breakpoints.lo_slot[i] - i;
      if (closed_before == i) cluster = centre[i];
      windows.offset[i] = centre[i] - cluster;
    }
  }
  windows.full_end = windows.lower;
  if (delta == 0) {
    for (const SegmentRange& range : windows.ranges) {
      int64_t end = range.begin;
      for (int64_t i = range.begin; i < range.end; ++i) {
        while (end < range.end && centre[end] <= centre[i]) ++end;
        windows.full_end[i] = static_cast<int32_t>(end);
      }
    }
  }
  return windows;
}

// Of the valid ones among `ranked`, [4, capacity].
inline Windows windows_of(const double* ranked, int64_t capacity, int64_t num_segments, double delta, bool is_double) {
  std::vector<SegmentRange> ranges = segment_ranges(ranked + kSegment * capacity, count_valid(ranked, capacity), num_segments);
  return is_double ? make_windows<double>(ranked, std::move(ranges), delta)
                   : make_windows<float>(ranked, std::move(ranges), delta);
}

// FP_i of every positive. counts, sums: the rows of `bins`; unit: of the fixed-point sums. Returns [V].
inline std::vector<double> false_positives(const Windows& windows, const int64_t* counts, const int64_t* sums, double unit) {
  const Breakpoints& points = windows.breakpoints;
  const int64_t largest = largest_range(windows.ranges);
  // From slot k on: the negatives, and their moment inside the cluster, from the end of which it is summed down: FP_i is small
  // near the top alone, and there nothing large may have to cancel.
  std::vector<uint64_t> from_slots(2 * largest + 1);
  std::vector<double> moments(2 * largest + 1), top(windows.count), result(windows.count);
  for (const SegmentRange& range : windows.ranges) {
    const int64_t first = 2 * range.begin, last = 2 * range.end;
    uint64_t* from_slot = from_slots.data() - first;
    double* moment = moments.data() - first;
    uint64_t negatives = from_slot[last] = 0;
    double sum = moment[last] = 0, end = 0;
    int64_t open = 0, next_lo = range.end - 1;
    for (int64_t slot = last; slot-- > first;) {
      const int64_t count = counts[slot + 1];
      const double edge = points.finite_edge(slot);
      sum = sum + static_cast<double>(sums[slot + 1]) * unit + static_cast<double>(count) * (edge - end);
      if (open == 0) {
        sum = 0;
        end = edge;
      }
      moment[slot] = sum;
      from_slot[slot] = negatives += static_cast<uint64_t>(count);
      // No branch depends on which one it is. The first slot is a lo.
      const bool is_lo = points.lo_slot[next_lo] == slot;
      top[next_lo] = end;
      next_lo -= is_lo;
      open += is_lo ? -1 : 1;
    }
    for (int64_t i = range.begin; i < range.end; ++i) {
      const int32_t lo = points.lo_slot[i], hi = points.hi_slot[i];
      result[i] = false_positives(static_cast<double>(from_slot[hi]), static_cast<double>(from_slot[lo] - from_slot[hi]),
                                  moment[lo] - moment[hi], windows.centre[i] - top[i], windows.delta);
    }
  }
  return result;
}

// The sum over all positives j of a segment, i itself included, of weight(j) H(s_j - s_i), for every positive i. Returns [V].
// From the top down: what stands below, and may be large, takes no digits from a sum.
template <class Weight>
std::vector<double> sum_over_positives(const Windows& windows, const Weight& weight) {
  struct Sums {
    double plain;
    double moment;
  };
  std::vector<Sums> of_range(largest_range(windows.ranges) + 1);
  std::vector<double> result(windows.count);
  for (const SegmentRange& range : windows.ranges) {
    Sums* from = of_range.data() - range.begin;
    from[range.end] = {0, 0};
    for (int64_t j = range.end; j-- > range.begin;) {
      const double value = weight(j);
      from[j] = {from[j + 1].plain + value, from[j + 1].moment + value * windows.offset[j]};
    }
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Sums low = from[windows.lower[i]], high = from[windows.upper[i]];
      const double inside = low.plain - high.plain;
      result[i] = high.plain + 0.5 * inside + (low.moment - high.moment - inside * windows.offset[i]) * windows.slope;
    }
  }
  return result;
}

// Fills `lines` [3, columns]: the gradient of a negative, sum_i c_i H(s - s_i). coefficient: [V].
inline void write_lines(const Windows& windows, const double* coefficient, double* lines, int64_t columns) {
  double *edge = lines, *value = lines + columns, *slope = lines + 2 * columns;
  const Breakpoints& points = windows.breakpoints;
  double closed = 0;
  for (const SegmentRange& range : windows.ranges) {
    double opened = 0, moment = 0, cluster = 0;
    int64_t next_lo = range.begin, next_hi = range.begin;
    closed = 0;
    for (int64_t slot = 2 * range.begin; slot < 2 * range.end; ++slot) {
      if (next_lo == next_hi) cluster = points.edges[slot];
      // No branch depends on which one it is. The last slot is a hi.
      const bool is_hi = points.hi_slot[next_hi] == slot;
      const int64_t i = is_hi ? next_hi : next_lo;
      next_hi += is_hi;
      next_lo += !is_hi;
      const double sign = is_hi ? -1 : 1;
      opened += sign * coefficient[i];
      moment += sign * coefficient[i] * (windows.centre[i] - cluster);
      closed += is_hi ? coefficient[i] : 0;
      if (next_lo == next_hi) opened = moment = 0;
      edge[slot] = points.edges[slot];
      value[slot] = line_value(closed, opened, moment, points.finite_edge(slot) - cluster, windows.delta);
      slope[slot] = windows.delta > 0 ? opened / (2 * windows.delta) : 0;
    }
  }
  for (int64_t slot = 2 * windows.count; slot < columns; ++slot) {
    edge[slot] = std::numeric_limits<double>::infinity();
    value[slot] = closed;
    slope[slot] = 0;
  }
}

}  // namespace rsloss
