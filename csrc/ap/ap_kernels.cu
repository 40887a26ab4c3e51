// The AP loss on a GPU, after the sweep, in double.
//   errors       one minus the precision at every positive: a warp each, over its windows among the bins and the positives
//   interpolate  the running minimum of the errors in a segment; coefficients and gradients
// The other stages are those of every ranking loss: ranking_finalize_kernels.cu.
#include "ap/ap.h"
#include "ap/ap_kernels.cuh"
#include "ranking/ranking_finalize.cuh"

namespace rsloss {
namespace {

template <class T>
struct AveragePrecisionTables {
  Sweep<T> sweep;
  double* false_positive;  // [capacity]
  double* error;           // [capacity], 1 - precision
  double* interpolated;    // [capacity], the least error of the segment up to this positive

  AveragePrecisionTables(const FinalizeArguments& arguments, Workspace* workspace)
      : sweep(arguments, workspace),
        false_positive(workspace->take<double>(arguments.capacity)),
        error(workspace->take<double>(arguments.capacity)),
        interpolated(workspace->take<double>(arguments.capacity)) {}
};

// Reads 8 bytes of cached memory per positive and 16 + sizeof(T) per bin of the window, writes 16 bytes per positive.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) average_precision_errors_kernel(AveragePrecisionTables<T> t) {
  wait_for_previous_kernel();
  const Sweep<T>& sweep = t.sweep;
  const int valid = sweep.valid();
  const double* centre = sweep.logit();
  for (int i = grid_warp(); i < valid; i += grid_warps()) {
    const Span span = sweep.span(i);
    const double own = centre[i];
    const Span open = open_positives(sweep, span, own);
    double sum = 0;
    for (int j = open.first + threadIdx.x % kWarp; j < open.last; j += kWarp) {
      sum += step_over_width(centre[j] - own, sweep.inverse_width);
    }
    sum = warp_sum(sum) + static_cast<double>(span.last - open.last);
    const double false_positive = window_false_positives(sweep, i, span);
    if (threadIdx.x % kWarp != 0) continue;
    t.false_positive[i] = false_positive;
    t.error[i] = average_precision_error(sum, false_positive, sweep.delta);
  }
}

// A running minimum in tiles of one block: every block first takes the minimum of what lies before its tile. Reads 16 bytes per
// positive and 8 per positive of the segment before the tile, writes 32.
template <class T>
__global__ void __launch_bounds__(kLargeBlock, 1)
    average_precision_interpolate_kernel(AveragePrecisionTables<T> t, bool is_interpolated) {
  wait_for_previous_kernel();
  __shared__ double scratch[kLargeBlock / kWarp];
  __shared__ Run runs[kLargeBlock / kWarp];
  const Sweep<T>& sweep = t.sweep;
  const int valid = sweep.valid();
  const int first = static_cast<int>(blockIdx.x) * kLargeBlock;
  if (first >= valid) return;
  const int i = first + static_cast<int>(threadIdx.x);
  const Span span = i < valid ? sweep.span(i) : Span{0, 0};
  double error = i < valid ? t.error[i] : INFINITY;
  if (is_interpolated) {
    const auto least = [](double a, double b) { return a < b ? a : b; };
    double before = INFINITY;
    for (int k = sweep.span(first).first + static_cast<int>(threadIdx.x); k < first; k += blockDim.x) {
      before = least(before, t.error[k]);
    }
    const double carry = block_minimum(before, scratch);
    error = block_running(error, i < valid && span.first == i, carry, runs, least);
  }
  if (i >= valid) return;
  const double scale = sweep.scale(span);
  t.interpolated[i] = error;
  sweep.coefficient[i] = average_precision_coefficient(error, t.false_positive[i]) * scale;
  sweep.gradients[kFirst * sweep.capacity + i] = -error * scale;
}

template <class T>
cudaError_t launch_typed(const FinalizeArguments& arguments, bool interpolated, void* loss) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  Workspace memory(arguments.workspace);
  const AveragePrecisionTables<T> tables(arguments, &memory);
  RSL_RETURN_IF_ERROR(launch_sweep<T>(tables.sweep, arguments.stream));
  if (arguments.capacity > 0) {
    RSL_RETURN_IF_ERROR(launch_dependent(average_precision_errors_kernel<T>, warp_grid(arguments.capacity, limits), kThreads, 0,
                                         arguments.stream, tables));
    RSL_RETURN_IF_ERROR(launch_dependent(average_precision_interpolate_kernel<T>, ceil_div(arguments.capacity, kLargeBlock),
                                         kLargeBlock, 0, arguments.stream, tables, interpolated));
  }
  RSL_RETURN_IF_ERROR(
      launch_losses<T>(tables.sweep, tables.interpolated, nullptr, static_cast<T*>(loss), nullptr, arguments.stream));
  return launch_tables<T>(tables.sweep, arguments.stream);
}

}  // namespace

int64_t average_precision_workspace_bytes(Type logits_type, int64_t capacity, int32_t num_segments) {
  return finalize_workspace_bytes<AveragePrecisionTables>(logits_type, capacity, num_segments);
}

cudaError_t launch_average_precision_finalize(const FinalizeArguments& arguments, bool interpolated, void* loss) {
  const auto typed = arguments.logits_type == Type::kDouble ? launch_typed<double> : launch_typed<float>;
  return typed(arguments, interpolated, loss);
}

}  // namespace rsloss
