// Device helpers that know nothing of any loss: conversions of 16-bit types, reductions and scans in a fixed order.
#pragma once

#include "common/cuda_launch.h"

namespace rsloss {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

// Kernels that are not limited by shared memory run in blocks of kThreads. Their launch bounds ask for four resident blocks,
// which leaves them 64 registers; kBlocksPerProcessor, of 2048 threads, is the most that fit. Their loops stride by the grid,
// so that any grid is right.
constexpr int kThreads = 256;
constexpr int kWarpsPerBlock = kThreads / kWarp;
constexpr int kBlocksPerProcessor = 8;
// Kernels that set up tables per block, or scan by a block, run in blocks of the largest size.
constexpr int kLargeBlock = 1024;

// No more blocks than can be resident at once: the rest would only wait.
inline int64_t resident_grid(int64_t blocks, const DeviceLimits& limits) {
  return std::min<int64_t>(blocks, static_cast<int64_t>(limits.processors) * kBlocksPerProcessor);
}

// The first thing that a kernel does that is launched by launch_dependent: lets the kernel behind it start, and waits until all
// kernels before it have ended and what they wrote can be read. Nothing where kernels follow one another anyway.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(RSL_CUDA_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

__device__ __forceinline__ int64_t grid_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
__device__ __forceinline__ int grid_warp() { return static_cast<int>(grid_thread() / kWarp); }
__device__ __forceinline__ int grid_warps() { return static_cast<int>(grid_threads() / kWarp); }

// The type in which a logit is compared and its gradient computed.
template <class Element>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class Element>
using Arithmetic = typename ArithmeticOf<Element>::type;

__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

__device__ __forceinline__ void narrow(float x, __half* out) { *out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(double x, double* out) { *out = x; }

template <class Element>
__device__ __forceinline__ Element narrowed(Arithmetic<Element> x) {
  Element element;
  narrow(x, &element);
  return element;
}

// One element of an array whose floating type is known at run time only; for the few elements that are positives.
__device__ __forceinline__ double load_as_double(const void* array, Type type, int64_t index) {
  switch (type) {
    case Type::kHalf:
      return widen(static_cast<const __half*>(array)[index]);
    case Type::kBFloat16:
      return widen(static_cast<const __nv_bfloat16*>(array)[index]);
    case Type::kFloat:
      return static_cast<const float*>(array)[index];
    default:
      return static_cast<const double*>(array)[index];
  }
}

// Sum over the warp, the same bits in every lane: a butterfly adds in one fixed tree.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Sum of `value` over the threads before this one, in a fixed order; `total` over the whole block. Every thread of the block
// must call it; blockDim.x is a multiple of 32. `scratch`: shared, one entry per warp.
template <class T>
__device__ __forceinline__ T block_exclusive_scan(T value, T* scratch, T* total) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  T inclusive = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  T before = __shfl_up_sync(kAllLanes, inclusive, 1);
  if (lane == 0) before = 0;
  if (lane == kWarp - 1) scratch[warp] = inclusive;
  __syncthreads();
  T before_warp = 0;
  T sum = 0;
  for (int other = 0; other < static_cast<int>(blockDim.x) / kWarp; ++other) {
    if (other == warp) before_warp = sum;
    sum += scratch[other];
  }
  // The next call overwrites `scratch`.
  __syncthreads();
  *total = sum;
  return before_warp + before;
}

// Sum over the block, the same bits in every thread. As above.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  T total;
  block_exclusive_scan(value, scratch, &total);
  return total;
}

// Least value over the block, in every thread. As above.
__device__ __forceinline__ double block_minimum(double value, double* scratch) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other < value ? other : value;
  }
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) value = scratch[warp] < value ? scratch[warp] : value;
  __syncthreads();
  return value;
}

// Part of a running combination that starts anew with every item that is the first of its run.
struct Run {
  double value;
  int has_first;
};

// Combination, in a fixed order, of `value` with those of the threads before it back to the first one of its run; a run without
// one in this block goes back to `carry`. As above.
template <class Combine>
__device__ __forceinline__ double block_running(double value, bool is_first, double carry, Run* scratch, Combine combine) {
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  Run run = {value, is_first};
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const double other = __shfl_up_sync(kAllLanes, run.value, distance);
    const int has_first = __shfl_up_sync(kAllLanes, run.has_first, distance);
    if (lane < distance || run.has_first) continue;
    run = {combine(other, run.value), has_first};
  }
  if (lane == kWarp - 1) scratch[warp] = run;
  __syncthreads();
  for (int other = warp - 1; other >= 0 && !run.has_first; --other) {
    run = {combine(scratch[other].value, run.value), scratch[other].has_first};
  }
  // The next call overwrites `scratch`.
  __syncthreads();
  return run.has_first ? run.value : combine(carry, run.value);
}

// [first, last): the contiguous items of `count` that belong to `part` of `parts`.
template <class Integer>
struct Share {
  Integer first;
  Integer last;

  __device__ __forceinline__ Share(Integer count, Integer part, Integer parts) {
    const Integer size = (count + parts - 1) / parts;
    first = part * size < count ? part * size : count;
    last = count - first < size ? count : first + size;
  }
};

}  // namespace rsloss
