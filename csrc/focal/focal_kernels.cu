// Element-wise sigmoid losses on a GPU.
//   forward    streams the levels once. Losses are summed in two floats, or in float64 where they are computed in it; the class
//              sums in registers, as a thread keeps to its classes. Each block adds up its threads in order
//   combine    adds the blocks up in order
//   elements, backward   stream the same and write the losses or gradients
// No atomics. Temporary memory: 8 bytes per block, and with class sums 16 for each of its classes.
#include "focal/focal_shape.cuh"
#include "focal/focal_tile.cuh"

namespace rsloss {
namespace {

// Sums of one class over the lanes of a block, by halves; cells: shared, [kSums][threads], each lane's own in place.
template <int kSums>
__device__ __forceinline__ void add_up_lanes(double* cells, int lanes, int lane, int units) {
  for (int left = lanes; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (lane < left - half) {
#pragma unroll
      for (int sum = 0; sum < kSums; ++sum) {
        double* const own = cells + sum * blockDim.x + threadIdx.x;
        *own += own[half * units];
      }
    }
    left = half;
  }
  __syncthreads();
}

class ExactSum {
 public:
  __device__ __forceinline__ void add(double x) { sum_ += x; }
  __device__ __forceinline__ double value() const { return sum_; }

 private:
  double sum_ = 0;
};

// The class sums of the classes that one thread keeps to, in registers.
template <class Sum, int kClasses>
class ClassSums {
 public:
  template <class Number>
  __device__ __forceinline__ void add(int v, bool is_positive, Number pull) {
#pragma unroll
    for (int k = 0; k < kClasses; ++k) {
      if (kClasses > 1 && k != v) continue;
      if (is_positive) {
        sums_[kPositiveSum][k].add(pull);
      } else {
        sums_[kNegativeSum][k].add(pull);
      }
    }
  }
  __device__ __forceinline__ double value(int row, int k) const { return sums_[row][k].value(); }

 private:
  Sum sums_[kClassSumRows][kClasses];
};

// loss_partials: [slots of all blocks]. sum_partials: [2, classes, slots of the blocks of one tile of classes].
struct FocalPartials {
  double* losses;
  double* sums;
  int64_t first_block;
  int64_t first_slot;
  int64_t slots;
};

template <class T, bool kAcross, bool kSums>
__global__ void __launch_bounds__(kThreads, kFocalBlocks<T, kSums>)
    focal_forward_kernel(FocalStream stream, FocalPartials partials) {
  constexpr int kClasses = FocalWalk<kAcross>::kClasses;
  RSL_DYNAMIC_SHARED(shared);
  __shared__ double scratch[kWarpsPerBlock];
  const FocalWalk<kAcross> walk(stream);
  const TileClasses<kAcross> tile(stream, walk, shared);
  CompensatedSum loss_sum;
  double exact_sum = 0;
  ClassSums<CompensatedSum, kClasses> class_sums;
  ClassSums<ExactSum, kClasses> exact_class_sums;
  walk.for_places(
      [&](const FocalStreamLevel& level, const FocalPlace& place) {
        unsigned exact = (1u << place.count) - 1;
        if constexpr (sizeof(T) == sizeof(float)) {
          const FocalQuad quad = load_quad<kAcross>(stream, level, place, walk.first_class());
          const bool has_weights = level.weights.data != nullptr;
          exact = 0;
#pragma unroll
          for (int v = 0; v < kQuad; ++v) {
            if ((quad.valid >> v & 1) == 0) continue;
            TwoFloat loss;
            float slope = 0;
            bool is_done = weighted_loss(tile, place, quad, v, has_weights, &loss);
            if constexpr (kSums) is_done = is_done && weighted_slope(tile, place, quad, v, 1, &slope);
            if (is_done) {
              loss_sum.add(loss);
              if constexpr (kSums) class_sums.add(v, (quad.positive >> v & 1) != 0, TwoFloat{fabsf(slope), 0});
            } else {
              exact |= 1u << v;
            }
          }
        }
        return exact;
      },
      [&](const FocalStreamLevel& level, const FocalPlace& place, int v) {
        FocalElement element;
        bool is_positive;
        if (!tile.exact(level, place, v, &element, &is_positive)) return;
        exact_sum += element.loss;
        if constexpr (kSums) exact_class_sums.add(v, is_positive, fabs(element.slope));
      });

  const double sum = block_sum(loss_sum.value() + exact_sum, scratch);
  if (threadIdx.x == 0) partials.losses[partials.first_block + blockIdx.x] = sum;
  if constexpr (kSums) {
    // Behind the barriers of the sum nobody reads the tables any more.
    double* const cells = reinterpret_cast<double*>(shared);
#pragma unroll
    for (int row = 0; row < kClassSumRows; ++row) {
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        cells[(row * kClasses + k) * blockDim.x + threadIdx.x] = class_sums.value(row, k) + exact_class_sums.value(row, k);
      }
    }
    const int units = stream.is_maps ? 1 : stream.units;
    add_up_lanes<kClassSumRows * kClasses>(cells, stream.lanes, walk.lane(), units);
    const int64_t slot = partials.first_slot + static_cast<int>(blockIdx.x) / stream.class_tiles;
    for (int c = static_cast<int>(threadIdx.x); c < walk.classes(); c += static_cast<int>(blockDim.x)) {
#pragma unroll
      for (int row = 0; row < kClassSumRows; ++row) {
        partials.sums[(row * static_cast<int64_t>(stream.classes) + walk.first_class() + c) * partials.slots + slot] =
            cells[(row * kClasses + c % kClasses) * blockDim.x + c / kClasses];
      }
    }
  }
}

// A warp per number: the loss, then the class sums.
__global__ void __launch_bounds__(kThreads, 4)
    focal_combine_kernel(const double* loss_partials, int64_t blocks, const double* sum_partials, int64_t slots, int sums,
                         const void* normalizer, Type normalizer_type, double scale, void* loss, Type loss_type,
                         double* class_sums) {
  for (int entry = grid_warp(); entry <= sums; entry += grid_warps()) {
    const double* const partials = entry == 0 ? loss_partials : sum_partials + (entry - 1) * slots;
    const int64_t count = entry == 0 ? blocks : slots;
    double sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += partials[i];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp != 0) continue;
    if (entry > 0) {
      class_sums[entry - 1] = sum;
      continue;
    }
    const double divided = normalizer == nullptr ? scale : scale / load_as_double(normalizer, normalizer_type, 0);
    if (loss_type == Type::kDouble) {
      *static_cast<double*>(loss) = divided * sum;
    } else {
      *static_cast<float*>(loss) = static_cast<float>(divided * sum);
    }
  }
}

// kGradients: dL/dz times the factor and what arrives for each element, else the loss times the factor.
template <class T, bool kAcross, bool kGradients>
__global__ void __launch_bounds__(kThreads, kFocalBlocks<T, false>) focal_elements_kernel(FocalStream stream) {
  RSL_DYNAMIC_SHARED(shared);
  const FocalWalk<kAcross> walk(stream);
  const TileClasses<kAcross> tile(stream, walk, shared);
  const double factor = stream.factor();
  walk.for_places(
      [&](const FocalStreamLevel& level, const FocalPlace& place) {
        unsigned exact = (1u << place.count) - 1;
        if constexpr (sizeof(T) == sizeof(float)) {
          const int64_t stride = kAcross ? 1 : place.element_stride;
          const FocalQuad quad = load_quad<kAcross>(stream, level, place, walk.first_class());
          float upstream[kQuad] = {1, 1, 1, 1};
          if (kGradients && level.grads.data != nullptr) {
            numbers_of(load_raw<kQuad>(level.grads, place.element, place.count, stride), level.grads.type, upstream);
          }
          const TwoFloat factor_parts = two_float(factor);
          const bool has_weights = level.weights.data != nullptr;
          float results[kQuad] = {0, 0, 0, 0};
          exact = 0;
#pragma unroll
          for (int v = 0; v < kQuad; ++v) {
            if ((quad.valid >> v & 1) == 0) continue;
            bool is_done;
            if constexpr (kGradients) {
              is_done = weighted_slope(tile, place, quad, v, factor_parts.high * upstream[v], &results[v]);
            } else {
              TwoFloat loss;
              is_done = weighted_loss(tile, place, quad, v, has_weights, &loss);
              const bool is_zero = loss.high == 0;
              loss = product_of(loss, factor_parts);
              results[v] = loss.high + loss.low;
              const float size = fabsf(results[v]);
              is_done = is_done && fabsf(factor_parts.high) < kLargestLoss &&
                        (is_zero || (size > kSmallestLoss && size < kLargestLoss));
            }
            if (!is_done) exact |= 1u << v;
          }
          store_numbers(level.outputs, place.element, place.count, results, stride);
        }
        return exact;
      },
      [&](const FocalStreamLevel& level, const FocalPlace& place, int v) {
        const int64_t at = place.element + v * place.element_stride;
        double upstream = factor;
        if (kGradients && level.grads.data != nullptr) upstream *= load_as_double(level.grads.data, level.grads.type, at);
        FocalElement element;
        bool is_positive;
        double result = 0;
        if (tile.exact(level, place, v, &element, &is_positive)) {
          result = upstream * (kGradients ? element.slope : element.loss);
        }
        store_as(level.outputs, at, result);
      });
}

cudaError_t launch_forward(const FocalShape& shape, const FocalStream& stream, int64_t grid, const FocalPartials& partials,
                           bool class_sums, cudaStream_t cuda_stream) {
  return dispatch(shape, [&](auto type, auto across) {
    using T = decltype(type);
    constexpr bool kAcross = decltype(across)::value;
    const auto kernel = class_sums ? focal_forward_kernel<T, kAcross, true> : focal_forward_kernel<T, kAcross, false>;
    return launch(kernel, grid, shape.block, shape.shared, cuda_stream, stream, partials);
  });
}

template <bool kGradients>
cudaError_t launch_elements(const FocalProblem& problem, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const FocalShape shape = focal_shape(problem, false, limits);
  return for_launches(problem, shape, [&](const FocalStream& levels, int64_t blocks) {
    return dispatch(shape, [&](auto type, auto across) {
      return launch(focal_elements_kernel<decltype(type), decltype(across)::value, kGradients>, blocks * shape.class_tiles,
                    shape.block, shape.shared, stream, levels);
    });
  });
}

}  // namespace

cudaError_t focal_forward_workspace_bytes(const FocalProblem& problem, bool class_sums, int64_t* bytes) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const FocalSlots slots = count_slots(problem, focal_shape(problem, class_sums, limits));
  Workspace workspace(nullptr);
  workspace.take<double>(slots.blocks);
  if (class_sums) workspace.take<double>(kClassSumRows * problem.classes * slots.of_tile);
  *bytes = workspace.bytes();
  return cudaSuccess;
}

cudaError_t launch_focal_forward(const FocalProblem& problem, void* loss, double* class_sums, void* workspace,
                                 cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const bool has_sums = class_sums != nullptr;
  const FocalShape shape = focal_shape(problem, has_sums, limits);
  const FocalSlots slots = count_slots(problem, shape);
  const int sums = has_sums ? static_cast<int>(kClassSumRows * problem.classes) : 0;
  Workspace space(workspace);
  FocalPartials partials = {};
  partials.slots = slots.of_tile;
  partials.losses = space.take<double>(slots.blocks);
  partials.sums = space.take<double>(sums * slots.of_tile);
  RSL_RETURN_IF_ERROR(for_launches(problem, shape, [&](const FocalStream& levels, int64_t blocks) {
    RSL_RETURN_IF_ERROR(launch_forward(shape, levels, blocks * shape.class_tiles, partials, has_sums, stream));
    partials.first_block += blocks * shape.class_tiles;
    partials.first_slot += blocks;
    return cudaSuccess;
  }));
  const Type loss_type = problem.logits_type == Type::kDouble ? Type::kDouble : Type::kFloat;
  const int64_t grid = resident_grid(ceil_div(sums + 1, kWarpsPerBlock), limits);
  return launch(focal_combine_kernel, grid, kThreads, 0, stream, partials.losses, slots.blocks, partials.sums, slots.of_tile,
                sums, problem.normalizer, problem.normalizer_type, problem.scale, loss, loss_type, class_sums);
}

cudaError_t launch_focal_elements(const FocalProblem& problem, cudaStream_t stream) {
  return launch_elements<false>(problem, stream);
}

cudaError_t launch_focal_backward(const FocalProblem& problem, cudaStream_t stream) {
  return launch_elements<true>(problem, stream);
}

}  // namespace rsloss
