// Rank & Sort on a GPU, after the sweep, in double: all pairs of positives, twice (a warp per positive, V^2 / 32 cached loads).
//   shared   breakpoints, counts from every slot: launched from ranking_kernels.cu
//   pairs    errors, coefficients and gradients of every positive from its window over the bins and from all positives above it
//   losses   one block: the two means, and the running sum of the coefficients
//   tables   what better positives push onto each positive; the lines of the negatives' gradient; padding
#include "rank_sort/rank_sort.h"
#include "rank_sort/rank_sort_kernels.cuh"
#include "ranking/ranking_device.cuh"

namespace rsloss {
namespace {

constexpr int kReduceThreads = 1024;

template <class T>
struct RankSortTables {
  const double* ranked;   // [4, capacity]
  const int64_t* counts;  // [2]
  const int64_t* bins;    // [2, 2 capacity + 1]
  int64_t capacity;
  double delta;
  double inverse_width;  // 1 / (2 delta), 0 for delta = 0
  double unit;           // of the fixed-point sums
  double gradient_scale;

  Breakpoints<T> breakpoints;
  int64_t* from_slot;     // [2 capacity + 1]
  double* ranking_error;  // [capacity]
  double* sorting_error;  // [capacity]
  double* coefficient;    // [capacity], with all factors
  double* weight;         // [capacity], with all factors
  double* closed;         // [capacity + 1], sums of the coefficients before i

  T* ranking;
  T* sorting;
  double* gradients;  // [3, capacity]
  double* lines;      // [3, 2 capacity]

  void take(Workspace* workspace) {
    breakpoints = Breakpoints<T>::take(workspace, capacity);
    from_slot = workspace->take<int64_t>(2 * capacity + 1);
    ranking_error = workspace->take<double>(capacity);
    sorting_error = workspace->take<double>(capacity);
    coefficient = workspace->take<double>(capacity);
    weight = workspace->take<double>(capacity);
    closed = workspace->take<double>(capacity + 1);
  }
};

// Reads 16 bytes of cached memory per pair and per bin of the window, writes 48 bytes per positive.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) rank_sort_pairs_kernel(RankSortTables<T> t) {
  const int valid = valid_positives(t.ranked, t.counts, t.capacity);
  const double* centre = t.ranked + kLogit * t.capacity;
  const double* quality = t.ranked + kQuality * t.capacity;
  // Outside of the lambda: nvcc 13.0 crashes below sm_100 where one captures all of t.
  const double delta = t.delta;
  const double scale = t.gradient_scale / static_cast<double>(valid);
  const int lane = threadIdx.x % kWarp;
  for (int i = grid_warp(); i < valid; i += grid_warps()) {
    const double own = centre[i];
    const double own_quality = quality[i];
    // H is 0 further down.
    const int first = partition_point(i, [=](int j) { return centre[j] >= own - delta; });
    QualitySums sums = {0, 0, 0, 0};
    for (int j = first + lane; j < valid; j += kWarp) {
      const double h = step_over_width(centre[j] - own, t.inverse_width);
      const double gap = quality[j] - own_quality;
      if (gap < 0) {
        sums.worse += h;
        sums.worse_deficit -= h * gap;
      } else {
        sums.better += h;
        sums.better_excess += h * gap;
      }
    }
    sums.worse = warp_sum(sums.worse);
    sums.worse_deficit = warp_sum(sums.worse_deficit);
    sums.better = warp_sum(sums.better);
    sums.better_excess = warp_sum(sums.better_excess);
    const double false_positive =
        window_false_positives(own, i, t.breakpoints, t.from_slot, t.bins, t.capacity, t.unit, t.delta);
    if (lane != 0) continue;
    const RankSortTerms terms = rank_sort_terms(sums, false_positive);
    t.ranking_error[i] = terms.ranking_error;
    t.sorting_error[i] = terms.sorting_error;
    t.coefficient[i] = terms.coefficient * scale;
    t.weight[i] = terms.weight * scale;
    t.gradients[kFirst * t.capacity + i] = terms.ranking_gradient * scale;
    t.gradients[kSecond * t.capacity + i] = terms.sorting_gradient * scale;
  }
}

// One block, every thread a contiguous run: reads 32 and writes 8 bytes per positive.
template <class T>
__global__ void __launch_bounds__(kReduceThreads, 1) rank_sort_losses_kernel(RankSortTables<T> t) {
  __shared__ double scratch[kReduceThreads / kWarp];
  const int valid = valid_positives(t.ranked, t.counts, t.capacity);
  const Share<int> share(valid, threadIdx.x, blockDim.x);
  double ranking = 0;
  double sorting = 0;
  double coefficient = 0;
  for (int i = share.first; i < share.last; ++i) {
    ranking += t.ranking_error[i];
    sorting += t.sorting_error[i];
    coefficient += t.coefficient[i];
  }
  double ranking_total;
  double sorting_total;
  double coefficient_total;
  block_exclusive_scan(ranking, scratch, &ranking_total);
  block_exclusive_scan(sorting, scratch, &sorting_total);
  double before = block_exclusive_scan(coefficient, scratch, &coefficient_total);
  for (int i = share.first; i < share.last; ++i) {
    t.closed[i] = before;
    before += t.coefficient[i];
  }
  if (threadIdx.x != 0) return;
  t.closed[valid] = coefficient_total;
  const bool is_broken = t.counts[kFound] > t.capacity || t.bins[0] > 0 || valid < used_columns(t.counts, t.capacity);
  const double mean = valid > 0 ? static_cast<double>(valid) : 1;
  *t.ranking = is_broken ? static_cast<T>(NAN) : static_cast<T>(ranking_total / mean);
  *t.sorting = is_broken ? static_cast<T>(NAN) : static_cast<T>(sorting_total / mean);
}

// Reads 24 bytes of cached memory per pair, 16 per open window, writes 48 + 24 bytes per column of the capacity.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) rank_sort_tables_kernel(RankSortTables<T> t) {
  const int valid = valid_positives(t.ranked, t.counts, t.capacity);
  const int used = used_columns(t.counts, t.capacity);
  const double* centre = t.ranked + kLogit * t.capacity;
  const double* quality = t.ranked + kQuality * t.capacity;
  const double delta = t.delta;
  const int lane = threadIdx.x % kWarp;
  for (int j = grid_warp(); j < valid; j += grid_warps()) {
    const double own = centre[j];
    const double own_quality = quality[j];
    // H is 0 against those further up.
    const int last = j + partition_point(valid - j, [=](int i) { return centre[j + i] > own + delta; });
    double pull = 0;
    for (int i = lane; i < last; i += kWarp) {
      if (quality[i] > own_quality) pull += t.weight[i] * step_over_width(own - centre[i], t.inverse_width);
    }
    pull = warp_sum(pull);
    if (lane == 0) t.gradients[kSecond * t.capacity + j] += pull;
    write_lines_of(j, centre, t.coefficient, t.closed, t.breakpoints, t.delta, t.capacity, t.lines);
  }
  const double last_value = t.closed[valid];
#pragma unroll 1
  for (int64_t column = grid_thread(); column < t.capacity; column += grid_threads()) {
    t.gradients[kGradientIndex * t.capacity + column] = t.ranked[kIndex * t.capacity + column];
    if (column < valid) continue;
    t.gradients[kFirst * t.capacity + column] = column < used ? NAN : 0;
    t.gradients[kSecond * t.capacity + column] = column < used ? NAN : 0;
    for (int64_t slot = 2 * column; slot < 2 * column + 2; ++slot) {
      t.lines[kBreakpoint * 2 * t.capacity + slot] = INFINITY;
      t.lines[kValue * 2 * t.capacity + slot] = last_value;
      t.lines[kSlope * 2 * t.capacity + slot] = 0;
    }
  }
}

template <class T>
cudaError_t launch_typed(const double* ranked, const int64_t* counts, const int64_t* bins, int64_t elements, int64_t capacity,
                         double delta, double gradient_scale, void* ranking, void* sorting, double* gradients, double* lines,
                         void* workspace, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  RankSortTables<T> tables = {};
  tables.ranked = ranked;
  tables.counts = counts;
  tables.bins = bins;
  tables.capacity = capacity;
  tables.delta = delta;
  tables.inverse_width = delta == 0 ? 0 : 1 / (2 * delta);
  tables.unit = fixed_point_unit(delta, fixed_point_bits(elements));
  tables.gradient_scale = gradient_scale;
  tables.ranking = static_cast<T*>(ranking);
  tables.sorting = static_cast<T*>(sorting);
  tables.gradients = gradients;
  tables.lines = lines;
  Workspace memory(workspace);
  tables.take(&memory);

  // A warp per positive.
  const int64_t grid = resident_grid(ceil_div(capacity, kWarpsPerBlock), limits);
  if (capacity > 0) {
    RSL_RETURN_IF_ERROR(launch_breakpoints<T>(ranked, counts, capacity, delta, tables.breakpoints, stream));
    RSL_RETURN_IF_ERROR(launch_count_from_slot(ranked, counts, bins, capacity, tables.from_slot, stream));
    RSL_RETURN_IF_ERROR(launch(rank_sort_pairs_kernel<T>, grid, kThreads, 0, stream, tables));
  }
  RSL_RETURN_IF_ERROR(launch(rank_sort_losses_kernel<T>, 1, kReduceThreads, 0, stream, tables));
  if (capacity == 0) return cudaSuccess;
  return launch(rank_sort_tables_kernel<T>, grid, kThreads, 0, stream, tables);
}

}  // namespace

int64_t rank_sort_workspace_bytes(Type logits_type, int64_t capacity) {
  Workspace workspace(nullptr);
  if (logits_type == Type::kDouble) {
    RankSortTables<double> tables = {};
    tables.capacity = capacity;
    tables.take(&workspace);
  } else {
    RankSortTables<float> tables = {};
    tables.capacity = capacity;
    tables.take(&workspace);
  }
  return workspace.bytes();
}

cudaError_t launch_rank_sort_finalize(Type logits_type, const double* ranked, const int64_t* counts, const int64_t* bins,
                                      int64_t elements, int64_t capacity, double delta, double gradient_scale, void* ranking,
                                      void* sorting, double* gradients, double* lines, void* workspace, cudaStream_t stream) {
  const auto typed = logits_type == Type::kDouble ? launch_typed<double> : launch_typed<float>;
  return typed(ranked, counts, bins, elements, capacity, delta, gradient_scale, ranking, sorting, gradients, lines, workspace,
               stream);
}

}  // namespace rsloss
