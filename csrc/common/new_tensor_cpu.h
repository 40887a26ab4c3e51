// New CPU tensors straight from the C interface: a call through the dispatcher costs several times as much, and a small loss
// makes ten.
#pragma once

#include "common/kept_memory.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

namespace rsloss {

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return strides;
}

// Uninitialised and contiguous; float16, bfloat16, float32, float64, int64 or uint8.
inline torch::stable::Tensor new_cpu_tensor(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  const int32_t dtype = type == ScalarType::Half       ? aoti_torch_dtype_float16()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                        : type == ScalarType::Float    ? aoti_torch_dtype_float32()
                        : type == ScalarType::Double   ? aoti_torch_dtype_float64()
                        : type == ScalarType::Long     ? aoti_torch_dtype_int64()
                                                       : aoti_torch_dtype_uint8();
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

// Where it is large, in memory that is kept from step to step.
inline torch::stable::Tensor new_cpu_tensor_like(const torch::stable::Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  void* memory = bytes < kSmallestKept ? nullptr : take_memory(bytes);
  if (!memory) return new_cpu_tensor(sizes, tensor.scalar_type());
  return torch::stable::from_blob(memory, sizes, contiguous_strides(sizes),
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), tensor.scalar_type(),
                                  return_memory);
}

}  // namespace rsloss
