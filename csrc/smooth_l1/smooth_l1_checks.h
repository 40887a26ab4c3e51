// Checks of the arguments of the smooth L1 operators, for the CPU and the CUDA glue alike.
#pragma once

#include <optional>
#include <string>

#include "common/checks.h"
#include "smooth_l1/smooth_l1.h"

namespace rsloss {

// Whether `tensor` has the first `dims` sizes of `pred` and no more.
inline bool has_sizes_of(const Tensor& tensor, const Tensor& pred, int64_t dims) {
  bool matches = tensor.dim() == dims;
  for (int64_t d = 0; matches && d < dims; ++d) matches = tensor.size(d) == pred.size(d);
  return matches;
}

inline void check_smooth_l1_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& pred) {
  check_floating(op, name, tensor);
  check_placement(op, name, tensor, pred, "pred");
}

inline void check_smooth_l1_number(const char* op, const char* name, const std::optional<Tensor>& number, const Tensor& pred) {
  if (!number) return;
  check_smooth_l1_tensor(op, name, *number, pred);
  STD_TORCH_CHECK(number->dim() == 0, op, ": ", name, " must have no dimensions, [], got ", shape_of(*number));
}

// What every operator gets.
inline void check_smooth_l1(const char* op, const Tensor& pred, const Tensor& target, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& beta, const std::optional<Tensor>& normalizer, double fixed_beta) {
  check_smooth_l1_tensor(op, "pred", pred, pred);
  check_smooth_l1_tensor(op, "target", target, pred);
  STD_TORCH_CHECK(has_sizes_of(target, pred, pred.dim()), op, ": target must have the shape of pred, ", shape_of(pred),
                  ", got ", shape_of(target));
  if (weight) {
    check_smooth_l1_tensor(op, "weight", *weight, pred);
    const bool may_be_rows = pred.dim() >= 2;
    STD_TORCH_CHECK(has_sizes_of(*weight, pred, pred.dim()) || (may_be_rows && has_sizes_of(*weight, pred, pred.dim() - 1)), op,
                    ": weight must have the shape of pred, ", shape_of(pred),
                    may_be_rows ? ", or that less the last dimension" : "", ", got ", shape_of(*weight));
  }
  check_smooth_l1_number(op, "beta", beta, pred);
  check_smooth_l1_number(op, "normalizer", normalizer, pred);
  STD_TORCH_CHECK(fixed_beta == 0 || (fixed_beta >= kSmallestBeta && fixed_beta <= kLargestBeta), op,
                  ": fixed_beta must be 0 or within [1e-30, 1e+30], got ", fixed_beta);
}

inline void check_smooth_l1_grad(const char* op, const Tensor& grad, const Tensor& pred) {
  check_smooth_l1_tensor(op, "grad", grad, pred);
  STD_TORCH_CHECK(grad.dim() == 0 || has_sizes_of(grad, pred, pred.dim()), op,
                  ": grad must have no dimensions or the shape of pred, ", shape_of(pred), ", got ", shape_of(grad));
}

}  // namespace rsloss
