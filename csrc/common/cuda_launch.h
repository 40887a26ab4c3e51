// What the .cu files and their glue share: the CUDA headers, launches, limits of the device, carving of temporary memory.
// No torch here. tests/cuda_on_cpu compiles the same sources with RSL_CUDA_EMULATOR, where a header of its own stands in for
// CUDA.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/launch_options.h"

#ifdef RSL_CUDA_EMULATOR
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define RSL_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define RSL_RETURN_IF_ERROR(expression)                 \
  do {                                                  \
    const cudaError_t error_code_ = (expression);       \
    if (error_code_ != cudaSuccess) return error_code_; \
  } while (0)

namespace rsloss {

// Element types of the caller's tensors.
enum class Type : int { kHalf, kBFloat16, kFloat, kDouble, kInt32, kInt64 };

inline bool is_16_bit(Type type) { return type == Type::kHalf || type == Type::kBFloat16; }

// Shared memory above 48 KiB is an opt-in, and the static part of a kernel, below 1 KiB in each, counts too.
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), size_t shared_bytes) {
  if (shared_bytes <= 47 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

// Enqueues `kernel` on `stream`; arguments convert to the kernel's parameters. is_dependent: the kernel begins with
// wait_for_previous_kernel(), so that it may start before the one that was enqueued before it has ended.
template <bool is_dependent = false, class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  RSL_RETURN_IF_ERROR(allow_shared(kernel, shared_bytes));
  cudaLaunchAttribute programmatic = {};
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.attrs = &programmatic;
  config.numAttrs = is_dependent && launch_options.is_programmatic ? 1 : 0;
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_dependent(void (*kernel)(Parameters...), int64_t grid, int block, size_t shared_bytes, cudaStream_t stream,
                             Arguments... arguments) {
  return launch<true>(kernel, grid, block, shared_bytes, stream, arguments...);
}

struct DeviceLimits {
  int processors;            // streaming multiprocessors
  int shared_per_block;      // bytes of dynamic shared memory that one block may opt in to
  int shared_per_processor;  // bytes
};

inline cudaError_t device_limits(DeviceLimits* limits) {
  int device;
  RSL_RETURN_IF_ERROR(cudaGetDevice(&device));
  RSL_RETURN_IF_ERROR(cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount, device));
  RSL_RETURN_IF_ERROR(cudaDeviceGetAttribute(&limits->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return cudaDeviceGetAttribute(&limits->shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out 16-byte aligned arrays from one allocation. With a null base it only adds up the bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    char* const at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return reinterpret_cast<T*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

}  // namespace rsloss
