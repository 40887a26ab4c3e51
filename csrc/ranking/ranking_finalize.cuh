// What the finalizers of all ranking losses share, in double: everything that is not the mathematics of one loss.
//   launch_sweep   breakpoints, and the number of negatives before every slot
//   (the loss)     errors, coefficients, gradients of the positives: a warp per positive, from its window over the bins
//   launch_losses  the means, and the running sums of the coefficients
//   launch_tables  the lines of the negatives' gradient; what the invalid positives and the padding get
// Sums of doubles restart in every segment.
#pragma once

#include "ranking/ranking_device.cuh"

namespace rsloss {

template <class T>
struct Sweep {
  const double* ranked;
  const int64_t* counts;
  const int64_t* bins;
  int64_t capacity;
  double delta;
  double inverse_width;  // 1 / (2 delta), 0 for delta = 0
  double widest;         // sets the unit of the bins' sums
  double gradient_scale;

  Breakpoints<T> breakpoints;
  uint64_t* before_slot;  // [2 capacity + 1], negatives at or right of the first edge and left of this one, of all segments
  double* coefficient;    // [capacity], c_i with all factors
  double* through;        // [capacity], sum of the coefficients of the segment up to i

  double* gradients;
  double* lines;

  Sweep(const FinalizeArguments& arguments, Workspace* workspace)
      : ranked(arguments.ranked),
        counts(arguments.counts),
        bins(arguments.bins),
        capacity(arguments.capacity),
        delta(arguments.delta),
        inverse_width(arguments.delta == 0 ? 0 : 1 / (2 * arguments.delta)),
        widest(fixed_point_unit(arguments.delta, 0)),
        gradient_scale(arguments.gradient_scale),
        breakpoints(Breakpoints<T>::take(workspace, arguments.capacity, arguments.num_segments)),
        before_slot(workspace->take<uint64_t>(2 * arguments.capacity + 1)),
        coefficient(workspace->take<double>(arguments.capacity)),
        through(workspace->take<double>(arguments.capacity)),
        gradients(arguments.gradients),
        lines(arguments.lines) {}

  __device__ __forceinline__ const double* logit() const { return ranked + kLogit * capacity; }
  __device__ __forceinline__ const double* quality() const { return ranked + kQuality * capacity; }
  __device__ __forceinline__ int valid() const { return valid_positives(breakpoints.segments); }
  __device__ __forceinline__ Span span(int i) const { return segment_span(ranked, capacity, breakpoints.segments, i); }
  // Of the gradient of a positive in this span: gradient_scale over its mean and the mean over segments.
  __device__ __forceinline__ double scale(Span of) const {
    return gradient_scale / (static_cast<double>(of.last - of.first) * static_cast<double>(*breakpoints.segments.holders));
  }
};

// Its constructor takes memory, so that a workspace without a base adds up the bytes.
template <template <class> class Tables>
int64_t finalize_workspace_bytes(Type logits_type, int64_t capacity, int32_t num_segments) {
  FinalizeArguments arguments = {};
  arguments.capacity = capacity;
  arguments.num_segments = num_segments;
  Workspace workspace(nullptr);
  if (logits_type == Type::kDouble) {
    Tables<double>(arguments, &workspace);
  } else {
    Tables<float>(arguments, &workspace);
  }
  return workspace.bytes();
}

template <class T>
cudaError_t launch_sweep(const Sweep<T>& sweep, cudaStream_t stream);

// first_error, second_error f64 [capacity], of every valid positive -> first, second: 0-d. The second may be null.
template <class T>
cudaError_t launch_losses(const Sweep<T>& sweep, const double* first_error, const double* second_error, T* first, T* second,
                          cudaStream_t stream);

// For a finalizer of one loss.
template <class T>
cudaError_t launch_tables(const Sweep<T>& sweep, cudaStream_t stream);

// FP of positive i by one warp, the same in every lane. It sums over the bins of the window itself, terms of one sign, so a
// small FP holds nothing that cancels, as differences of running sums would. Reads 16 + sizeof(T) cached bytes per bin of the
// window.
template <class T>
__device__ __forceinline__ double window_false_positives(const Sweep<T>& sweep, int i, Span span) {
  const int lo = sweep.breakpoints.lo_slot[i];
  const int hi = sweep.breakpoints.hi_slot[i];
  const T* const edges = sweep.breakpoints.edges;
  const double origin = edges[lo];
  const double unit = FixedPoint<T>(sweep.widest, sweep.counts).unit;
  // The bin right of edge k is bin k + 1.
  const int64_t* count = sweep.bins + 1;
  const int64_t* fixed = sweep.bins + (2 * sweep.capacity + 1) + 1;
  double moment = 0;
  for (int k = lo + threadIdx.x % kWarp; k < hi; k += kWarp) {
    // No empty bin: above the largest finite value its edge is infinite.
    if (count[k] == 0) continue;
    moment += static_cast<double>(fixed[k]) * unit + static_cast<double>(count[k]) * (static_cast<double>(edges[k]) - origin);
  }
  moment = warp_sum(moment);
  const uint64_t* const before = sweep.before_slot;
  const double inside = static_cast<double>(before[hi] - before[lo]);
  const double above = static_cast<double>(before[2 * span.last] - before[hi]);
  return false_positives(above, inside, moment, sweep.logit()[i] - origin, sweep.delta);
}

// Ranks [first, last) of a window among the positives of a segment: against logit `own` H is 0 before it and 1 behind it.
template <class T>
__device__ __forceinline__ Span open_positives(const Sweep<T>& sweep, Span span, double own) {
  const double* const logit = sweep.logit() + span.first;
  const int count = span.last - span.first;
  const double lowest = own - sweep.delta;
  const double highest = own + sweep.delta;
  return {span.first + partition_point(count, [=](int j) { return logit[j] >= lowest; }),
          span.first + partition_point(count, [=](int j) { return logit[j] > highest; })};
}

// The line right of one edge by one warp: `closed` = sum of c_i with hi_i at or left of the edge, and the positives [open,
// open_end) whose windows hold it.
template <class T>
__device__ __forceinline__ void write_line(const Sweep<T>& sweep, double closed, int open, int open_end, int slot) {
  const double edge = sweep.breakpoints.edges[slot];
  const double* const centre = sweep.logit();
  double opened = 0;
  double moment = 0;
  for (int i = open + threadIdx.x % kWarp; i < open_end; i += kWarp) {
    opened += sweep.coefficient[i];
    moment += sweep.coefficient[i] * (centre[i] - edge);
  }
  opened = warp_sum(opened);
  moment = warp_sum(moment);
  if (threadIdx.x % kWarp == 0) {
    const int64_t slots = 2 * sweep.capacity;
    sweep.lines[kBreakpoint * slots + slot] = edge;
    sweep.lines[kValue * slots + slot] = line_value(closed, opened, moment, 0, sweep.delta);
    sweep.lines[kSlope * slots + slot] = sweep.delta == 0 ? 0 : opened / (2 * sweep.delta);
  }
}

// Both lines of positive i by one warp. Left of lo_i lie lo_slot - i - first closed windows of the segment; left of or at hi_i
// those of first..i are closed, and the windows below hi_slot - i have opened.
template <class T>
__device__ __forceinline__ void write_lines_of(const Sweep<T>& sweep, int i) {
  const int first = sweep.span(i).first;
  const int lo = sweep.breakpoints.lo_slot[i];
  const int hi = sweep.breakpoints.hi_slot[i];
  const int open = lo - i;
  write_line(sweep, open == first ? 0 : sweep.through[open - 1], open, i + 1, lo);
  write_line(sweep, sweep.through[i], i + 1, hi - i, hi);
}

// Rows of the gradients that every loss fills alike, that of a second loss where there is none, and all that is not of a valid
// positive, by all threads of the grid.
template <class T>
__device__ __forceinline__ void write_remaining(const Sweep<T>& sweep, int num_losses) {
  const int valid = sweep.valid();
  const int used = used_columns(sweep.counts, sweep.capacity);
  const int64_t capacity = sweep.capacity;
  const double last_value = valid > 0 ? sweep.through[valid - 1] : 0;
#pragma unroll 1
  for (int64_t column = grid_thread(); column < capacity; column += grid_threads()) {
    sweep.gradients[kGradientIndex * capacity + column] = sweep.ranked[kIndex * capacity + column];
    sweep.gradients[kGradientSegment * capacity + column] =
        column < valid ? sweep.ranked[kSegment * capacity + column] : sweep.breakpoints.segments.count;
    if (num_losses == 1) sweep.gradients[kSecond * capacity + column] = 0;
    if (column < valid) continue;
    sweep.gradients[kFirst * capacity + column] = column < used ? NAN : 0;
    if (num_losses == 2) sweep.gradients[kSecond * capacity + column] = column < used ? NAN : 0;
    for (int64_t slot = 2 * column; slot < 2 * column + 2; ++slot) {
      sweep.lines[kBreakpoint * 2 * capacity + slot] = INFINITY;
      sweep.lines[kValue * 2 * capacity + slot] = last_value;
      sweep.lines[kSlope * 2 * capacity + slot] = 0;
    }
  }
}

// A warp per positive of the capacity.
inline int64_t warp_grid(int64_t capacity, const DeviceLimits& limits) {
  return resident_grid(ceil_div(capacity, kWarpsPerBlock), limits);
}

}  // namespace rsloss
