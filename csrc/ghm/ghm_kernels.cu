// Gradient harmonizing on a GPU.
//   histogram  streams preds, targets and weights once. Bin 0, which holds most elements of a trained model, is summed in
//              registers, the others in columns of shared memory that a thread has for itself or shares with neighbours, who
//              take turns. Each block adds its columns up in order
//   combine    adds the blocks up in order
//   finalize   the density of each bin, its weight, the loss: one block
//   backward   streams the same again and writes the gradient, whose weights are a table in shared memory
// No atomics. Temporary memory: 16 bytes per bin and block.
#include "ghm/ghm_elements.cuh"

namespace rsloss {
namespace {

// float64 takes twice the registers; a rare float64 path for soft targets a few more than four blocks leave to each.
template <class T, GhmForm form>
constexpr int kHistogramBlocks = sizeof(T) == sizeof(double) ? 2
                                 : form == GhmForm::kDense   ? 3
                                                             : 4;
template <class T>
constexpr int kBackwardBlocks = sizeof(T) == sizeof(double) ? 2 : 4;

// Sums and counts of the bins above 0, in columns; 2^shift adjacent threads share one.
class BinColumns {
 public:
  static constexpr int kBytes = sizeof(double) + sizeof(uint32_t);

  __device__ __forceinline__ BinColumns(void* shared, int bins, int shift)
      : columns_(static_cast<int>(blockDim.x) >> shift), shift_(shift) {
    const int cells = (bins - 1) * columns_;
    sums_ = static_cast<double*>(shared);
    counts_ = reinterpret_cast<uint32_t*>(sums_ + cells);
    for (int cell = threadIdx.x; cell < cells; cell += blockDim.x) {
      sums_[cell] = 0;
      counts_[cell] = 0;
    }
  }

  // By whole warps. Nothing to add where bin < 1, as mostly.
  __device__ __forceinline__ void add(int bin, double loss) {
    const bool is_there = bin > 0;
    if (shift_ == 0 ? !is_there : __ballot_sync(kAllLanes, is_there) == 0) return;
    const int thread = static_cast<int>(threadIdx.x);
    const int cell = (bin - 1) * columns_ + (thread >> shift_);
    const int sharers = 1 << shift_;
#pragma unroll 1
    for (int turn = 0; turn < sharers; ++turn) {
      if (is_there && (thread & (sharers - 1)) == turn) {
        sums_[cell] += loss;
        ++counts_[cell];
      }
      if (shift_ > 0) __syncwarp();
    }
  }

  // Sums over the columns of one bin, by a warp, after a barrier.
  __device__ __forceinline__ void total(int bin, double* count, double* sum) const {
    int64_t found = 0;
    double losses = 0;
    for (int column = threadIdx.x % kWarp; column < columns_; column += kWarp) {
      found += counts_[(bin - 1) * columns_ + column];
      losses += sums_[(bin - 1) * columns_ + column];
    }
    *count = static_cast<double>(warp_sum(found));
    *sum = warp_sum(losses);
  }

 private:
  double* sums_;
  uint32_t* counts_;
  int columns_;
  int shift_;
};

// Reads preds, targets and weights once. partials: [2 (bins + 1), blocks]; this launch fills the columns from first_block on.
template <class T, GhmForm form>
__global__ void __launch_bounds__(kThreads, kHistogramBlocks<T, form>)
    ghm_histogram_kernel(GhmStream stream, Thresholds thresholds, int bins, double mu, int shift, double* partials,
                         int64_t first_block, int64_t blocks) {
  using Evaluate = Elements<T, form>;
  RSL_DYNAMIC_SHARED(shared);
  __shared__ double scratch[kWarpsPerBlock];
  __shared__ int64_t count_scratch[kWarpsPerBlock];
  auto* const edges = reinterpret_cast<typename Evaluate::Position*>(shared);
  BinColumns columns(reinterpret_cast<double*>(shared) + bins + 1, bins, shift);
  const Evaluate elements(thresholds, bins, mu, edges);

  // All valid elements less those of other bins and of none: fewer steps for most elements.
  double easy_sum = 0;
  uint32_t easy_count = 0;
  uint32_t broken = 0;
  stream_quads<T, form>(stream, [&](int64_t, int, const T(&preds)[kQuad], const T(&targets)[kQuad], unsigned valid) {
    easy_count += __popc(valid);
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      BinAndLoss found = {0, 0};
      if ((valid >> v & 1) != 0) found = elements.loss(preds[v], targets[v]);
      if (found.bin == 0) {
        easy_sum += found.loss;
      } else {
        --easy_count;
        broken += found.bin == kNoBin;
      }
      columns.add(found.bin, found.loss);
    }
  });

  const double sum = block_sum(easy_sum, scratch);
  const int64_t count = block_sum(static_cast<int64_t>(easy_count), count_scratch);
  const int64_t total_broken = block_sum(static_cast<int64_t>(broken), count_scratch);
  const int64_t own = first_block + blockIdx.x;
  double* const counts = partials + own;
  double* const sums = partials + (bins + 1) * blocks + own;
  if (threadIdx.x == 0) {
    counts[0] = static_cast<double>(count);
    sums[0] = sum;
    counts[bins * blocks] = static_cast<double>(total_broken);
    sums[bins * blocks] = 0;
  }
  for (int bin = 1 + static_cast<int>(threadIdx.x) / kWarp; bin < bins; bin += kWarpsPerBlock) {
    double bin_count, bin_sum;
    columns.total(bin, &bin_count, &bin_sum);
    if (threadIdx.x % kWarp != 0) continue;
    counts[bin * blocks] = bin_count;
    sums[bin * blocks] = bin_sum;
  }
}

// A warp per entry of the histogram: 8 bytes read per block.
__global__ void __launch_bounds__(kThreads, 4)
    ghm_combine_kernel(const double* partials, int64_t blocks, int entries, double* histogram) {
  for (int entry = grid_warp(); entry < entries; entry += grid_warps()) {
    double sum = 0;
    for (int64_t block = threadIdx.x % kWarp; block < blocks; block += kWarp) sum += partials[entry * blocks + block];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) histogram[entry] = sum;
  }
}

// One block, a thread per bin: a few dozen bytes each.
__global__ void __launch_bounds__(kMostBins, 1) ghm_finalize_kernel(GhmFinalizeArguments a) {
  __shared__ double scratch[kMostBins / kWarp];
  const int bin = static_cast<int>(threadIdx.x);
  const bool is_bin = bin < a.bins;
  const double count = is_bin ? a.histogram[kBinCount * (a.bins + 1) + bin] : 0;
  const double sum = is_bin ? a.histogram[kBinLoss * (a.bins + 1) + bin] : 0;
  const bool is_filled = count > 0;
  const bool has_state = is_bin && a.acc_sum != nullptr;
  const bool has_updates = is_bin && a.num_updates != nullptr;
  const double before = has_state ? load_as_double(a.acc_sum, a.state_type, bin) : count;
  const int64_t updates_before = has_updates ? a.num_updates[bin] : 0;
  const double filled = block_sum<double>(is_filled, scratch);
  const BinDensity density =
      update_density(count, before, updates_before, a.momentum, a.count_empty_bins, a.num_updates != nullptr);
  const double weight = bin_weight(count, density.density, a.count_empty_bins ? a.bins : filled);
  double loss = block_sum(is_filled ? weight * sum : 0.0, scratch);
  if (a.histogram[a.bins] > 0) loss = NAN;
  if (bin == 0) {
    if (a.loss_type == Type::kDouble) {
      *static_cast<double*>(a.loss) = loss;
    } else {
      *static_cast<float*>(a.loss) = static_cast<float>(loss);
    }
  }
  if (!is_bin) return;
  const bool is_kept = filled > 0 && isfinite(loss);
  const double after = is_kept ? density.acc_sum : before;
  if (a.state_type == Type::kDouble) {
    static_cast<double*>(a.new_acc_sum)[bin] = after;
  } else {
    static_cast<float*>(a.new_acc_sum)[bin] = static_cast<float>(after);
  }
  if (has_updates) a.new_num_updates[bin] = is_kept ? density.num_updates : updates_before;
  a.bin_weights[bin] = weight * a.gradient_scale;
}

// Reads preds, targets and weights once, writes the gradients.
template <class T, GhmForm form>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T>)
    ghm_backward_kernel(GhmStream stream, Thresholds thresholds, int bins, double mu, const double* bin_weights,
                        const void* grad_loss, Type grad_loss_type) {
  using Evaluate = Elements<T, form>;
  RSL_DYNAMIC_SHARED(shared);
  auto* const edges = reinterpret_cast<typename Evaluate::Position*>(shared);
  T* const weights = reinterpret_cast<T*>(reinterpret_cast<double*>(shared) + bins + 1);
  const double upstream = load_as_double(grad_loss, grad_loss_type, 0);
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) weights[bin] = static_cast<T>(bin_weights[bin] * upstream);
  const Evaluate elements(thresholds, bins, mu, edges);
  stream_quads<T, form>(stream,
                        [&](int64_t first, int count, const T(&preds)[kQuad], const T(&targets)[kQuad], unsigned valid) {
                          T gradients[kQuad];
#pragma unroll
                          for (int v = 0; v < kQuad; ++v) {
                            gradients[v] = 0;
                            if ((valid >> v & 1) == 0) continue;
                            const BinAndSlope<T> found = elements.slope(preds[v], targets[v]);
                            gradients[v] = found.bin == kNoBin ? static_cast<T>(NAN) : weights[found.bin] * found.slope;
                          }
                          store_numbers(stream.gradients, first, count, gradients);
                        });
}

GhmStream stream_of(const GhmProblem& problem, const GhmDeviceLevel& level, int64_t grid) {
  GhmStream stream = {};
  stream.preds = column_of(level.preds, problem.preds_type);
  stream.targets = column_of(level.targets, level.targets_type);
  stream.weights = column_of(level.weights, level.weights_type);
  stream.gradients = column_of(level.gradients, problem.preds_type);
  stream.weights_by_row = level.weights != nullptr && level.weights_by_row;
  stream.background_first = problem.background_first;
  stream.elements = level.elements;
  stream.shape = level.shape;
  const int64_t step = grid * kThreads * kQuad;
  stream.row_step = step / level.shape.classes;
  stream.column_step = step % level.shape.classes;
  return stream;
}

Thresholds thresholds_of(const GhmProblem& problem) {
  Thresholds thresholds = {};
  thresholds.at[0] = -INFINITY;
  for (int k = 1; k < problem.bins; ++k) {
    thresholds.at[k] = problem.mu > 0 ? regression_threshold(k, problem.bins, problem.mu) : hard_threshold(k, problem.bins);
  }
  thresholds.at[problem.bins] = NAN;
  return thresholds;
}

// In float32 where neither preds nor dense targets are wider.
bool is_double(const GhmProblem& problem, const GhmDeviceLevel& level) {
  return problem.preds_type == Type::kDouble || level.targets_type == Type::kDouble;
}

// Calls body(T, form) with a value of the type and a constant of the form of a level.
template <class Body>
cudaError_t dispatch(const GhmProblem& problem, const GhmDeviceLevel& level, Body body) {
  const auto with_type = [&](auto type) {
    using T = decltype(type);
    if (problem.mu > 0) return body(T{}, std::integral_constant<GhmForm, GhmForm::kRegression>{});
    if (is_label(level.targets_type)) return body(T{}, std::integral_constant<GhmForm, GhmForm::kLabels>{});
    return body(T{}, std::integral_constant<GhmForm, GhmForm::kDense>{});
  };
  return is_double(problem, level) ? with_type(double{}) : with_type(float{});
}

int64_t edges_bytes(int bins) { return (bins + 1) * static_cast<int64_t>(sizeof(double)); }

struct HistogramShape {
  int shift;       // 2^shift threads share a column
  int64_t shared;  // bytes
  int64_t grid;
};

// As many threads share a column as it takes for two blocks to be resident, so that enough loads are on their way.
HistogramShape histogram_shape(const GhmProblem& problem, const GhmDeviceLevel& level, const DeviceLimits& limits) {
  // A block's own bookkeeping and static shared memory.
  constexpr int64_t kReserved = 2048;
  HistogramShape shape = {};
  for (;; ++shape.shift) {
    shape.shared = edges_bytes(problem.bins) + (problem.bins - 1) * BinColumns::kBytes * (kThreads >> shape.shift);
    const int64_t taken = shape.shared + kReserved;
    if ((2 * taken <= limits.shared_per_processor && taken <= limits.shared_per_block) || kWarp >> shape.shift == 1) break;
  }
  const int64_t fitting = std::max<int64_t>(1, limits.shared_per_processor / (shape.shared + kReserved));
  int64_t most = 0;
  dispatch(problem, level, [&](auto type, auto form) {
    most = kHistogramBlocks<decltype(type), decltype(form)::value>;
    return cudaSuccess;
  });
  shape.grid = std::min(ceil_div(level.elements, kThreads * kQuad), limits.processors * std::min(fitting, most));
  return shape;
}

}  // namespace

cudaError_t ghm_histogram_workspace_bytes(const GhmProblem& problem, int64_t* bytes) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  int64_t blocks = 0;
  for (int i = 0; i < problem.num_levels; ++i) blocks += histogram_shape(problem, problem.levels[i], limits).grid;
  *bytes = 2 * (problem.bins + 1) * blocks * static_cast<int64_t>(sizeof(double));
  return cudaSuccess;
}

cudaError_t launch_ghm_histogram(const GhmProblem& problem, double* histogram, void* workspace, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const Thresholds thresholds = thresholds_of(problem);
  double* const partials = static_cast<double*>(workspace);
  int64_t blocks = 0;
  for (int i = 0; i < problem.num_levels; ++i) blocks += histogram_shape(problem, problem.levels[i], limits).grid;
  int64_t first_block = 0;
  for (int i = 0; i < problem.num_levels; ++i) {
    const GhmDeviceLevel& level = problem.levels[i];
    if (level.elements == 0) continue;
    const HistogramShape shape = histogram_shape(problem, level, limits);
    RSL_RETURN_IF_ERROR(dispatch(problem, level, [&](auto type, auto form) {
      return launch(ghm_histogram_kernel<decltype(type), decltype(form)::value>, shape.grid, kThreads, shape.shared, stream,
                    stream_of(problem, level, shape.grid), thresholds, problem.bins, problem.mu, shape.shift, partials,
                    first_block, blocks);
    }));
    first_block += shape.grid;
  }
  const int entries = kHistogramRows * (problem.bins + 1);
  return launch(ghm_combine_kernel, ceil_div(entries, kWarpsPerBlock), kThreads, 0, stream, partials, blocks, entries,
                histogram);
}

cudaError_t launch_ghm_finalize(const GhmFinalizeArguments& arguments, cudaStream_t stream) {
  return launch(ghm_finalize_kernel, 1, kMostBins, 0, stream, arguments);
}

cudaError_t launch_ghm_backward(const GhmProblem& problem, const double* bin_weights, const void* grad_loss,
                                Type grad_loss_type, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const Thresholds thresholds = thresholds_of(problem);
  for (int i = 0; i < problem.num_levels; ++i) {
    const GhmDeviceLevel& level = problem.levels[i];
    if (level.elements == 0) continue;
    const int64_t grid = resident_grid(ceil_div(level.elements, kThreads * kQuad), limits);
    const int64_t shared = edges_bytes(problem.bins) + problem.bins * static_cast<int64_t>(sizeof(double));
    RSL_RETURN_IF_ERROR(dispatch(problem, level, [&](auto type, auto form) {
      return launch(ghm_backward_kernel<decltype(type), decltype(form)::value>, grid, kThreads, shared, stream,
                    stream_of(problem, level, grid), thresholds, problem.bins, problem.mu, bin_weights, grad_loss,
                    grad_loss_type);
    }));
  }
  return cudaSuccess;
}

}  // namespace rsloss
