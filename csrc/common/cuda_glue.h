// What the torch glue of every CUDA operator shares: the current device and stream, and errors of CUDA as exceptions.
// Under RSL_CUDA_EMULATOR the same glue registers for CPU tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/macros/Export.h>

#include "common/checks.h"
#include "common/cuda_launch.h"

#ifdef RSL_CUDA_EMULATOR
#define RSL_CUDA_KEY CPU
#else
#define RSL_CUDA_KEY CUDA
#endif

namespace rsloss {

#ifdef RSL_CUDA_EMULATOR
class CurrentStream {
 public:
  explicit CurrentStream(const Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
};

inline void check_cuda(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed with error ", static_cast<int>(error));
}
#else
// Makes the device of a tensor the current one, for the lifetime of this object, and holds its current stream.
class C10_HIDDEN CurrentStream {
 public:
  explicit CurrentStream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_cuda(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}
#endif

inline Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Int:
      return Type::kInt32;
    case ScalarType::Long:
      return Type::kInt64;
    default:
      STD_TORCH_CHECK(false, "rsloss_kernels: no kernel for this dtype");
  }
}

// The dtype of losses and of the gradients that arrive for them.
inline ScalarType loss_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

template <class T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace rsloss
