// The classification part of aLRP on a GPU, after the sweep, in double: all pairs of positives, once (a warp per positive).
// The other stages are those of every ranking loss: ranking_finalize_kernels.cu.
#include "alrp/alrp.h"
#include "alrp/alrp_kernels.cuh"
#include "ranking/ranking_finalize.cuh"

namespace rsloss {
namespace {

template <class T>
struct LocalisationTables {
  Sweep<T> sweep;
  double* error;  // [capacity]
  double* rank;   // [capacity], out

  LocalisationTables(const FinalizeArguments& arguments, Workspace* workspace)
      : sweep(arguments, workspace), error(workspace->take<double>(arguments.capacity)), rank(nullptr) {}
};

// Reads 16 bytes of cached memory per pair and 16 + sizeof(T) per bin of the window, writes 40 bytes per positive.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) alrp_pairs_kernel(LocalisationTables<T> t) {
  wait_for_previous_kernel();
  const Sweep<T>& sweep = t.sweep;
  const int valid = sweep.valid();
  const double* centre = sweep.logit();
  const double* regression_loss = sweep.quality();
  for (int i = grid_warp(); i < valid; i += grid_warps()) {
    const Span span = sweep.span(i);
    const double own = centre[i];
    double sum = 0;
    double regression = 0;
    for (int j = open_positives(sweep, span, own).first + threadIdx.x % kWarp; j < span.last; j += kWarp) {
      const double h = step_over_width(centre[j] - own, sweep.inverse_width);
      sum += h;
      if (j != i) regression += h * regression_loss[j];
    }
    sum = warp_sum(sum);
    regression = warp_sum(regression);
    const double false_positive = window_false_positives(sweep, i, span);
    if (threadIdx.x % kWarp != 0) continue;
    const LocalisationTerms terms = localisation_terms(sum, regression, false_positive, sweep.delta);
    const double scale = sweep.scale(span);
    t.rank[i] = terms.rank;
    t.error[i] = terms.error;
    sweep.coefficient[i] = terms.coefficient * scale;
    sweep.gradients[kFirst * sweep.capacity + i] = terms.gradient * scale;
  }
  const int used = used_columns(sweep.counts, sweep.capacity);
  for (int64_t column = valid + grid_thread(); column < sweep.capacity; column += grid_threads()) {
    t.rank[column] = column < used ? NAN : 0;
  }
}

template <class T>
cudaError_t launch_typed(const FinalizeArguments& arguments, void* classification, double* rank) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  Workspace memory(arguments.workspace);
  LocalisationTables<T> tables(arguments, &memory);
  tables.rank = rank;
  RSL_RETURN_IF_ERROR(launch_sweep<T>(tables.sweep, arguments.stream));
  if (arguments.capacity > 0) {
    RSL_RETURN_IF_ERROR(
        launch_dependent(alrp_pairs_kernel<T>, warp_grid(arguments.capacity, limits), kThreads, 0, arguments.stream, tables));
  }
  RSL_RETURN_IF_ERROR(
      launch_losses<T>(tables.sweep, tables.error, nullptr, static_cast<T*>(classification), nullptr, arguments.stream));
  return launch_tables<T>(tables.sweep, arguments.stream);
}

}  // namespace

int64_t alrp_workspace_bytes(Type logits_type, int64_t capacity, int32_t num_segments) {
  return finalize_workspace_bytes<LocalisationTables>(logits_type, capacity, num_segments);
}

cudaError_t launch_alrp_finalize(const FinalizeArguments& arguments, void* classification, double* rank) {
  const auto typed = arguments.logits_type == Type::kDouble ? launch_typed<double> : launch_typed<float>;
  return typed(arguments, classification, rank);
}

}  // namespace rsloss
