// Rank & Sort on a GPU, after the sweep, in double: all pairs of positives, twice (a warp per positive, V^2 / 32 cached loads).
//   pairs    errors, coefficients and gradients of every positive from its window over the bins and from all positives above it
//   tables   what better positives push onto each positive; the lines of the negatives' gradient; padding
// The other stages are those of every ranking loss: ranking_finalize_kernels.cu.
#include "rank_sort/rank_sort.h"
#include "rank_sort/rank_sort_kernels.cuh"
#include "ranking/ranking_finalize.cuh"

namespace rsloss {
namespace {

template <class T>
struct RankSortTables {
  Sweep<T> sweep;
  double* ranking_error;  // [capacity]
  double* sorting_error;  // [capacity]
  double* weight;         // [capacity], with all factors

  RankSortTables(const FinalizeArguments& arguments, Workspace* workspace)
      : sweep(arguments, workspace),
        ranking_error(workspace->take<double>(arguments.capacity)),
        sorting_error(workspace->take<double>(arguments.capacity)),
        weight(workspace->take<double>(arguments.capacity)) {}
};

// Reads 16 bytes of cached memory per pair and per bin of the window, writes 48 bytes per positive.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) rank_sort_pairs_kernel(RankSortTables<T> t) {
  wait_for_previous_kernel();
  const Sweep<T>& sweep = t.sweep;
  const int valid = sweep.valid();
  const double* centre = sweep.logit();
  const double* quality = sweep.quality();
  for (int i = grid_warp(); i < valid; i += grid_warps()) {
    const Span span = sweep.span(i);
    const double own = centre[i];
    const double own_quality = quality[i];
    QualitySums sums = {0, 0, 0, 0};
    for (int j = open_positives(sweep, span, own).first + threadIdx.x % kWarp; j < span.last; j += kWarp) {
      const double h = step_over_width(centre[j] - own, sweep.inverse_width);
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
    const double false_positive = window_false_positives(sweep, i, span);
    if (threadIdx.x % kWarp != 0) continue;
    const RankSortTerms terms = rank_sort_terms(sums, false_positive);
    const double scale = sweep.scale(span);
    t.ranking_error[i] = terms.ranking_error;
    t.sorting_error[i] = terms.sorting_error;
    t.weight[i] = terms.weight * scale;
    sweep.coefficient[i] = terms.coefficient * scale;
    sweep.gradients[kFirst * sweep.capacity + i] = terms.ranking_gradient * scale;
    sweep.gradients[kSecond * sweep.capacity + i] = terms.sorting_gradient * scale;
  }
}

// Reads 24 bytes of cached memory per pair, 16 per open window, writes 48 + 48 bytes per column of the capacity.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) rank_sort_tables_kernel(RankSortTables<T> t) {
  wait_for_previous_kernel();
  const Sweep<T>& sweep = t.sweep;
  const int valid = sweep.valid();
  const double* centre = sweep.logit();
  const double* quality = sweep.quality();
  for (int j = grid_warp(); j < valid; j += grid_warps()) {
    const Span span = sweep.span(j);
    const double own = centre[j];
    const double own_quality = quality[j];
    const int last = open_positives(sweep, span, own).last;
    double pull = 0;
    for (int i = span.first + threadIdx.x % kWarp; i < last; i += kWarp) {
      if (quality[i] > own_quality) pull += t.weight[i] * step_over_width(own - centre[i], sweep.inverse_width);
    }
    pull = warp_sum(pull);
    if (threadIdx.x % kWarp == 0) sweep.gradients[kSecond * sweep.capacity + j] += pull;
    write_lines_of(sweep, j);
  }
  write_remaining(sweep, 2);
}

template <class T>
cudaError_t launch_typed(const FinalizeArguments& arguments, void* ranking, void* sorting) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  Workspace memory(arguments.workspace);
  const RankSortTables<T> tables(arguments, &memory);
  const int64_t grid = warp_grid(arguments.capacity, limits);
  RSL_RETURN_IF_ERROR(launch_sweep<T>(tables.sweep, arguments.stream));
  if (grid > 0) RSL_RETURN_IF_ERROR(launch_dependent(rank_sort_pairs_kernel<T>, grid, kThreads, 0, arguments.stream, tables));
  RSL_RETURN_IF_ERROR(launch_losses<T>(tables.sweep, tables.ranking_error, tables.sorting_error, static_cast<T*>(ranking),
                                       static_cast<T*>(sorting), arguments.stream));
  return grid > 0 ? launch_dependent(rank_sort_tables_kernel<T>, grid, kThreads, 0, arguments.stream, tables) : cudaSuccess;
}

}  // namespace

int64_t rank_sort_workspace_bytes(Type logits_type, int64_t capacity, int32_t num_segments) {
  return finalize_workspace_bytes<RankSortTables>(logits_type, capacity, num_segments);
}

cudaError_t launch_rank_sort_finalize(const FinalizeArguments& arguments, void* ranking, void* sorting) {
  const auto typed = arguments.logits_type == Type::kDouble ? launch_typed<double> : launch_typed<float>;
  return typed(arguments, ranking, sorting);
}

}  // namespace rsloss
