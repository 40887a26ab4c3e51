// Checks that the torch glue of every operator makes, on CPU and CUDA alike. Messages name the operator, the argument, what was
// wanted and what was got; they end up as RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

namespace rsloss {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half || type == ScalarType::BFloat16;
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

// The dispatcher lets None pass for a tensor, whatever the schema says.
inline void check_defined(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.defined(), op, ": ", name, " must be a Tensor, got None");
}

inline void check_floating(const char* op, const char* name, const Tensor& tensor) {
  check_defined(op, name, tensor);
  STD_TORCH_CHECK(is_floating(tensor.scalar_type()), op, ": ", name, " must be float16, bfloat16, float32 or float64, got ",
                  toString(tensor.scalar_type()));
}

// What every tensor argument must be: where the first one is, and contiguous.
inline void check_placement(const char* op, const char* name, const Tensor& tensor, const Tensor& first,
                            const char* first_name = "logits") {
  check_defined(op, name, tensor);
  STD_TORCH_CHECK(same_device(tensor, first), op, ": ", name, " must be on the device of ", first_name, ", ", device_of(first),
                  ", got ", device_of(tensor));
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous, got shape ", shape_of(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType type) {
  check_defined(op, name, tensor);
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " must have dtype ", toString(type), ", got ",
                  toString(tensor.scalar_type()));
}

inline void check_logits(const char* op, const Tensors& logits) {
  STD_TORCH_CHECK(!logits.empty(), op, ": logits must hold at least one tensor, got none");
  for (const Tensor& level : logits) {
    check_floating(op, "logits", level);
    STD_TORCH_CHECK(level.scalar_type() == logits[0].scalar_type(), op, ": logits must all have one dtype, ",
                    toString(logits[0].scalar_type()), ", got ", toString(level.scalar_type()));
    check_placement(op, "logits", level, logits[0]);
  }
}

// A table that another operator made; columns < 0: any number.
inline void check_table(const char* op, const char* name, const Tensor& table, const Tensor& logits, ScalarType type,
                        int64_t rows, int64_t columns) {
  check_placement(op, name, table, logits);
  check_dtype(op, name, table, type);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == rows && (columns < 0 || table.size(1) == columns), op, ": ", name,
                  " must have shape [", rows, ", ", columns < 0 ? std::string("any") : std::to_string(columns), "], got ",
                  shape_of(table));
}

inline void check_vector(const char* op, const char* name, const Tensor& vector, const Tensor& logits, ScalarType type,
                         int64_t size) {
  check_placement(op, name, vector, logits);
  check_dtype(op, name, vector, type);
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size, op, ": ", name, " must have shape [", size, "], got ",
                  shape_of(vector));
}

inline void check_delta(const char* op, double delta) {
  STD_TORCH_CHECK(delta == 0 || (delta >= 1e-30 && delta <= 1e30), op, ": delta must be 0 or within [1e-30, 1e30], got ",
                  delta);
}

inline int64_t count_elements(const Tensors& logits) {
  int64_t count = 0;
  for (const Tensor& level : logits) count += level.numel();
  return count;
}

// 64-bit words of the bit mask: every tensor of the list starts at a word of its own.
inline int64_t mask_words(int64_t elements) { return (elements + 63) / 64; }

inline int64_t mask_bytes(const Tensors& logits) {
  int64_t words = 0;
  for (const Tensor& level : logits) words += mask_words(level.numel());
  return words * 8;
}

}  // namespace rsloss
