// Smooth L1 loss on a GPU.
//   forward    streams pred, target and weights once; losses are summed in two floats, or in float64 where they are computed in
//              it. Each block adds up its threads in order. A block on its own writes the loss
//   combine    adds the blocks up in order
//   elements, backward   stream the same and write losses or gradients
// No atomics. Temporary memory: 8 bytes per block.
#include <type_traits>

#include "common/quads.cuh"
#include "smooth_l1/smooth_l1_kernels.cuh"

namespace rsloss {
namespace {

// So few elements are one block's: a launch to add up would cost more.
constexpr int64_t kOneBlock = 16384;

struct SmoothL1Stream {
  Column pred;
  Column target;
  Column weight;  // data null: all are 1
  Column grad;    // of each element; data null: none
  Column output;
  int64_t row;
  int64_t elements;
  // One number each, read on the device.
  const void* beta;
  Type beta_type;
  const void* normalizer;
  Type normalizer_type;
  const void* grad_loss;
  Type grad_loss_type;
  double fixed_beta;
  double scale;
};

__device__ __forceinline__ SmoothL1Beta beta_of(const SmoothL1Stream& stream) {
  return smooth_l1_beta(stream.beta == nullptr ? stream.fixed_beta : load_as_double(stream.beta, stream.beta_type, 0));
}

__device__ __forceinline__ double factor_of(const SmoothL1Stream& stream) {
  double factor = stream.scale;
  if (stream.normalizer != nullptr) factor /= load_as_double(stream.normalizer, stream.normalizer_type, 0);
  if (stream.grad_loss != nullptr) factor *= load_as_double(stream.grad_loss, stream.grad_loss_type, 0);
  return factor;
}

__device__ __forceinline__ int64_t row_of(int64_t element, int64_t row) {
  const uint64_t at = static_cast<uint64_t>(element), width = static_cast<uint64_t>(row);
  // A division of 64 bits costs several of 32.
  return static_cast<int64_t>((at | width) >> 32 == 0 ? static_cast<uint32_t>(at) / static_cast<uint32_t>(width) : at / width);
}

template <class T>
struct SmoothL1Quad {
  int64_t first;
  int count;
  T pred[kQuad];
  T target[kQuad];
  T weight[kQuad];  // 0 behind the last element
};

// Calls use(quad, grads) for every quad; grads are 1 where there are none.
template <class T, class Use>
__device__ __forceinline__ void stream_quads(const SmoothL1Stream& stream, Use use) {
  constexpr int kWords = sizeof(T);
  const bool by_element = stream.weight.data != nullptr && stream.row == 1, by_row = stream.row > 1;
  for (int64_t first = grid_thread() * kQuad; first < stream.elements; first += grid_threads() * kQuad) {
    SmoothL1Quad<T> quad;
    quad.first = first;
    quad.count = stream.elements - first < kQuad ? static_cast<int>(stream.elements - first) : kQuad;
    const RawQuad<kWords> pred = load_raw<kWords>(stream.pred, first, quad.count);
    const RawQuad<kWords> target = load_raw<kWords>(stream.target, first, quad.count);
    RawQuad<kWords> weight, grad;
    if (by_element) weight = load_raw<kWords>(stream.weight, first, quad.count);
    if (stream.grad.data != nullptr) grad = load_raw<kWords>(stream.grad, first, quad.count);
    numbers_of(pred, stream.pred.type, quad.pred);
    numbers_of(target, stream.target.type, quad.target);
    T grads[kQuad] = {1, 1, 1, 1};
    if (stream.grad.data != nullptr) numbers_of(grad, stream.grad.type, grads);
    if (by_element) {
      numbers_of(weight, stream.weight.type, quad.weight);
    } else {
#pragma unroll
      for (int v = 0; v < kQuad; ++v) {
        quad.weight[v] = v >= quad.count ? T(0) : T(1);
        if (by_row && v < quad.count) quad.weight[v] = load_number<T>(stream.weight, row_of(first + v, stream.row));
      }
    }
    use(quad, grads);
  }
}

// beta in the floats that the loss of an element takes.
struct FloatBeta {
  float beta;
  TwoFloat half;
  TwoFloat inverse;
};

__device__ __forceinline__ FloatBeta float_beta(const SmoothL1Beta& beta) {
  return {static_cast<float>(beta.beta), two_float(beta.half), two_float(beta.inverse)};
}

// w l in two floats. False: what overflows, underflows or is not a number is for float64.
__device__ __forceinline__ bool weighted_loss(float pred, float target, float weight, const FloatBeta& beta, TwoFloat* loss) {
  TwoFloat d = sum_of(pred, TwoFloat{-target, 0});
  if (d.high < 0) d = {-d.high, -d.low};
  const TwoFloat half_of_d = {0.5f * d.high, 0.5f * d.low};
  const TwoFloat square = product_of(half_of_d, product_of(d, beta.inverse));
  const TwoFloat linear = sum_of(d, TwoFloat{-beta.half.high, -beta.half.low});
  const TwoFloat unweighted = d.high < beta.beta ? square : linear;
  *loss = product_of(unweighted, TwoFloat{weight, 0});
  const float size = fabsf(loss->high);
  // A large weight would bring back what the low float of a tiny loss has lost.
  const bool is_normal = unweighted.high > 1e-30f && size > 1e-30f && size < 1e30f;
  return (d.high == 0 && beta.beta == beta.beta && fabsf(weight) < 1e30f) || is_normal;
}

template <class T>
__device__ __forceinline__ double exact_loss(const SmoothL1Quad<T>& quad, int v, const SmoothL1Beta& beta) {
  const double d = static_cast<double>(quad.pred[v]) - static_cast<double>(quad.target[v]);
  return static_cast<double>(quad.weight[v]) * smooth_l1_value(d, beta);
}

__device__ __forceinline__ void write_loss(const Column& loss, double sum, const SmoothL1Stream& stream) {
  store_as(loss, 0, sum * factor_of(stream));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) smooth_l1_forward_kernel(SmoothL1Stream stream, double* partials) {
  __shared__ double scratch[kWarpsPerBlock];
  const SmoothL1Beta beta = beta_of(stream);
  const FloatBeta floats = float_beta(beta);
  CompensatedSum sum;
  double exact_sum = 0;
  stream_quads<T>(stream, [&](const SmoothL1Quad<T>& quad, const T(&)[kQuad]) {
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      if (quad.weight[v] == 0) continue;
      TwoFloat loss;
      if (sizeof(T) == sizeof(float) && weighted_loss(static_cast<float>(quad.pred[v]), static_cast<float>(quad.target[v]),
                                                      static_cast<float>(quad.weight[v]), floats, &loss)) {
        sum.add(loss);
      } else {
        exact_sum += exact_loss(quad, v, beta);
      }
    }
  });
  const double total = block_sum(sum.value() + exact_sum, scratch);
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    write_loss(stream.output, total, stream);
  } else {
    partials[blockIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    smooth_l1_combine_kernel(SmoothL1Stream stream, const double* partials, int64_t blocks) {
  __shared__ double scratch[kWarpsPerBlock];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += blockDim.x) sum += partials[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) write_loss(stream.output, sum, stream);
}

// In float64 whatever T: a rare wish.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) smooth_l1_elements_kernel(SmoothL1Stream stream) {
  const SmoothL1Beta beta = beta_of(stream);
  const double factor = factor_of(stream);
  stream_quads<T>(stream, [&](const SmoothL1Quad<T>& quad, const T(&)[kQuad]) {
    T losses[kQuad];
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      losses[v] = quad.weight[v] == 0 ? T(0) : static_cast<T>(exact_loss(quad, v, beta) * factor);
    }
    store_numbers(stream.output, quad.first, quad.count, losses);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) smooth_l1_backward_kernel(SmoothL1Stream stream) {
  const SmoothL1Beta exact = beta_of(stream);
  const T beta = static_cast<T>(exact.beta);
  const T inverse = static_cast<T>(exact.inverse);
  const T factor = static_cast<T>(smooth_l1_factor(factor_of(stream), exact));
  stream_quads<T>(stream, [&](const SmoothL1Quad<T>& quad, const T(&grads)[kQuad]) {
    T gradients[kQuad];
#pragma unroll
    for (int v = 0; v < kQuad; ++v) {
      const T slope = smooth_l1_slope<T>(quad.pred[v] - quad.target[v], beta, inverse);
      gradients[v] = quad.weight[v] == 0 ? T(0) : quad.weight[v] * (slope * (grads[v] * factor));
    }
    store_numbers(stream.output, quad.first, quad.count, gradients);
  });
}

SmoothL1Stream stream_of(const SmoothL1DeviceProblem& problem, void* output, Type output_type) {
  SmoothL1Stream stream = {};
  stream.pred = column_of(problem.pred, problem.pred_type);
  stream.target = column_of(problem.target, problem.target_type);
  stream.weight = column_of(problem.weight, problem.weight_type);
  stream.output = column_of(output, output_type);
  stream.row = problem.weight == nullptr ? 1 : problem.row;
  stream.elements = problem.elements;
  stream.beta = problem.beta;
  stream.beta_type = problem.beta_type;
  stream.normalizer = problem.normalizer;
  stream.normalizer_type = problem.normalizer_type;
  stream.fixed_beta = problem.fixed_beta;
  stream.scale = problem.scale;
  return stream;
}

// Calls body(T): float where nothing is wider.
template <class Body>
cudaError_t dispatch(const SmoothL1DeviceProblem& problem, bool has_double_grads, Body body) {
  const bool is_double = problem.pred_type == Type::kDouble || problem.target_type == Type::kDouble || has_double_grads ||
                         (problem.weight != nullptr && problem.weight_type == Type::kDouble);
  return is_double ? body(double{}) : body(float{});
}

cudaError_t grid_of(const SmoothL1DeviceProblem& problem, int64_t* grid) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  *grid = resident_grid(ceil_div(problem.elements, kThreads * kQuad), limits);
  return cudaSuccess;
}

cudaError_t forward_grid(const SmoothL1DeviceProblem& problem, int64_t* grid) {
  *grid = 1;
  return problem.elements <= kOneBlock ? cudaSuccess : grid_of(problem, grid);
}

}  // namespace

cudaError_t smooth_l1_workspace_bytes(const SmoothL1DeviceProblem& problem, int64_t* bytes) {
  int64_t grid;
  RSL_RETURN_IF_ERROR(forward_grid(problem, &grid));
  *bytes = grid > 1 ? grid * static_cast<int64_t>(sizeof(double)) : 0;
  return cudaSuccess;
}

cudaError_t launch_smooth_l1_forward(const SmoothL1DeviceProblem& problem, Type loss_type, void* loss, void* workspace,
                                     cudaStream_t stream) {
  int64_t grid;
  RSL_RETURN_IF_ERROR(forward_grid(problem, &grid));
  double* const partials = static_cast<double*>(workspace);
  const SmoothL1Stream columns = stream_of(problem, loss, loss_type);
  RSL_RETURN_IF_ERROR(dispatch(problem, false, [&](auto type) {
    return launch(smooth_l1_forward_kernel<decltype(type)>, grid, kThreads, 0, stream, columns, partials);
  }));
  if (grid == 1) return cudaSuccess;
  return launch(smooth_l1_combine_kernel, 1, kThreads, 0, stream, columns, partials, grid);
}

cudaError_t launch_smooth_l1_elements(const SmoothL1DeviceProblem& problem, void* losses, cudaStream_t stream) {
  if (problem.elements == 0) return cudaSuccess;
  int64_t grid;
  RSL_RETURN_IF_ERROR(grid_of(problem, &grid));
  const SmoothL1Stream columns = stream_of(problem, losses, problem.pred_type);
  return dispatch(problem, false, [&](auto type) {
    return launch(smooth_l1_elements_kernel<decltype(type)>, grid, kThreads, 0, stream, columns);
  });
}

cudaError_t launch_smooth_l1_backward(const SmoothL1DeviceProblem& problem, const void* grad, Type grad_type,
                                      bool grad_is_of_loss, void* gradient, cudaStream_t stream) {
  if (problem.elements == 0) return cudaSuccess;
  int64_t grid;
  RSL_RETURN_IF_ERROR(grid_of(problem, &grid));
  SmoothL1Stream columns = stream_of(problem, gradient, problem.pred_type);
  if (grad_is_of_loss) {
    columns.grad_loss = grad;
    columns.grad_loss_type = grad_type;
  } else {
    columns.grad = column_of(grad, grad_type);
  }
  return dispatch(problem, !grad_is_of_loss && grad_type == Type::kDouble, [&](auto type) {
    return launch(smooth_l1_backward_kernel<decltype(type)>, grid, kThreads, 0, stream, columns);
  });
}

}  // namespace rsloss
