// Checks of the arguments of the GHM operators, for the CPU and the CUDA glue alike.
#pragma once

#include <optional>
#include <string>

#include "common/checks.h"
#include "common/index_shape.h"
#include "ghm/ghm.h"

namespace rsloss {

inline bool has_shape(const Tensor& tensor, const Tensor& pred, int64_t dims) {
  bool matches = tensor.dim() == dims;
  for (int64_t d = 0; matches && d < dims; ++d) matches = tensor.size(d) == pred.size(d);
  return matches;
}

// The shape of `tensor` less its last dimension, in words.
inline std::string row_shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d + 1 < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline void check_ghm_placement(const char* op, const char* name, const Tensor& tensor, const Tensor& pred) {
  check_placement(op, name, tensor, pred, "preds");
}

// [B, A, *spatial], what each row of maps [B, A C, *spatial] has one of; C is above 1.
inline bool has_map_rows(const Tensor& tensor, const Tensor& pred) {
  bool matches = pred.dim() >= 2 && tensor.dim() == pred.dim();
  for (int64_t d = 0; matches && d < pred.dim(); ++d) {
    const int64_t rows = tensor.size(d), elements = pred.size(d);
    matches = d == 1 ? (rows == 0 ? elements == 0 : elements % rows == 0 && elements != rows) : rows == elements;
  }
  return matches;
}

inline bool has_rows(const Tensor& tensor, const Tensor& pred) {
  return (pred.dim() > 0 && has_shape(tensor, pred, pred.dim() - 1)) || has_map_rows(tensor, pred);
}

inline bool is_class_index(ScalarType type) { return type == ScalarType::Int || type == ScalarType::Long; }

inline void check_ghm_target(const char* op, const Tensor& target, const Tensor& pred, bool is_regression) {
  const ScalarType type = target.scalar_type();
  if (is_floating(type)) {
    STD_TORCH_CHECK(has_shape(target, pred, pred.dim()), op, ": targets must have the shape of preds, ", shape_of(pred),
                    ", got ", shape_of(target));
    return;
  }
  STD_TORCH_CHECK(!is_regression && is_class_index(type), op, ": targets must be ", is_regression ? "" : "int32, int64, ",
                  "float16, bfloat16, float32 or float64, got ", toString(type));
  STD_TORCH_CHECK(pred.dim() > 0, op, ": preds must have a last dimension of classes for class indices, got shape []");
  STD_TORCH_CHECK(has_rows(target, pred), op,
                  ": targets must have the shape of preds less the last dimension (class indices), ", row_shape_of(pred),
                  ", or [B, A, *spatial] for maps [B, A C, *spatial], got ", shape_of(target));
}

inline void check_ghm_weight(const char* op, const Tensor& weight, const Tensor& target, const Tensor& pred,
                             bool is_regression) {
  check_floating(op, "weights", weight);
  const bool may_have_rows = !is_regression && pred.dim() > 0, is_index = !is_floating(target.scalar_type());
  const std::string or_rows = may_have_rows ? " or that less the last dimension, " + row_shape_of(pred) : std::string();
  // Of class indices the rows are those of the labels.
  const bool has_own_rows = is_index ? shape_of(weight) == shape_of(target) : has_rows(weight, pred);
  STD_TORCH_CHECK(has_shape(weight, pred, pred.dim()) || (may_have_rows && has_own_rows), op,
                  ": weights must have the shape of preds, ", shape_of(pred), or_rows, ", got ", shape_of(weight));
}

// Whether a level's weights, which have been checked, are one per row.
inline bool are_by_row(const Tensor& weight, const Tensor& pred) { return !has_shape(weight, pred, pred.dim()); }

// `rows`: what each row of `pred` has one of, labels or weights, which have been checked.
inline IndexShape index_shape_of(const Tensor& pred, const Tensor& rows) {
  if (rows.dim() < pred.dim()) return {pred.size(pred.dim() - 1), 1};
  int64_t places = 1;
  for (int64_t d = 2; d < pred.dim(); ++d) places *= pred.size(d);
  return {rows.size(1) > 0 ? pred.size(1) / rows.size(1) : 1, places};
}

// What every GHM operator gets.
inline void check_ghm_levels(const char* op, const Tensors& preds, const Tensors& targets, const Tensors& weights,
                             const std::optional<double>& mu) {
  STD_TORCH_CHECK(!preds.empty(), op, ": preds must hold at least one tensor, got none");
  STD_TORCH_CHECK(targets.size() == preds.size(), op, ": targets must hold as many tensors as preds, ", preds.size(), ", got ",
                  targets.size());
  STD_TORCH_CHECK(weights.empty() || weights.size() == preds.size(), op, ": weights must hold as many tensors as preds, ",
                  preds.size(), ", got ", weights.size());
  STD_TORCH_CHECK(!mu || (*mu >= 1e-30 && *mu <= 1e30), op, ": mu must be within [1e-30, 1e+30], got ", mu.value_or(0));
  for (size_t level = 0; level < preds.size(); ++level) {
    const Tensor& pred = preds[level];
    check_floating(op, "preds", pred);
    check_dtype(op, "preds", pred, preds[0].scalar_type());
    check_ghm_placement(op, "preds", pred, preds[0]);
    check_ghm_placement(op, "targets", targets[level], preds[0]);
    check_ghm_target(op, targets[level], pred, mu.has_value());
    if (weights.empty()) continue;
    check_ghm_placement(op, "weights", weights[level], preds[0]);
    check_ghm_weight(op, weights[level], targets[level], pred, mu.has_value());
  }
}

inline void check_ghm_bins(const char* op, int64_t bins) {
  STD_TORCH_CHECK(bins >= 1 && bins <= kMostBins, op, ": bins must be within 1..", kMostBins, ", got ", bins);
}

inline void check_ghm_histogram(const char* op, const Tensor& histogram, const Tensor& pred, int64_t bins) {
  check_ghm_placement(op, "histogram", histogram, pred);
  check_dtype(op, "histogram", histogram, ScalarType::Double);
  STD_TORCH_CHECK(histogram.dim() == 2 && histogram.size(0) == kHistogramRows && histogram.size(1) == bins + 1, op,
                  ": histogram must have shape [", static_cast<int>(kHistogramRows), ", ", bins + 1, "], got ",
                  shape_of(histogram));
}

inline void check_ghm_per_bin(const char* op, const char* name, const Tensor& tensor, const Tensor& pred, int64_t bins) {
  check_ghm_placement(op, name, tensor, pred);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == bins, op, ": ", name, " must have one number per bin, [", bins,
                  "], got ", shape_of(tensor));
}

inline void check_ghm_state(const char* op, const std::optional<Tensor>& acc_sum, const std::optional<Tensor>& num_updates,
                            const Tensor& pred, int64_t bins, double momentum) {
  STD_TORCH_CHECK(momentum >= 0 && momentum < 1, op, ": momentum must be within [0, 1), got ", momentum);
  STD_TORCH_CHECK(acc_sum || momentum == 0, op, ": acc_sum must be given, momentum ", momentum,
                  " needs it, at first torch.zeros(", bins, "), got None");
  STD_TORCH_CHECK(acc_sum || !num_updates, op, ": acc_sum must be given with num_updates, got None");
  if (acc_sum) {
    const ScalarType type = acc_sum->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": acc_sum must be float32 or float64, got ",
                    toString(type));
    check_ghm_per_bin(op, "acc_sum", *acc_sum, pred, bins);
  }
  if (num_updates) {
    check_dtype(op, "num_updates", *num_updates, ScalarType::Long);
    check_ghm_per_bin(op, "num_updates", *num_updates, pred, bins);
  }
}

// Returns the number of bins.
inline int64_t check_ghm_backward(const char* op, const Tensor& bin_weights, const Tensor& grad_loss, const Tensor& pred) {
  check_ghm_placement(op, "bin_weights", bin_weights, pred);
  STD_TORCH_CHECK(bin_weights.dim() == 1 && bin_weights.size(0) >= 1 && bin_weights.size(0) <= kMostBins, op,
                  ": bin_weights must have shape [bins] with 1..", kMostBins, " of them, got ", shape_of(bin_weights));
  check_dtype(op, "bin_weights", bin_weights, ScalarType::Double);
  check_ghm_placement(op, "grad_loss", grad_loss, pred);
  check_floating(op, "grad_loss", grad_loss);
  STD_TORCH_CHECK(grad_loss.dim() == 0, op, ": grad_loss must have no dimensions, [], got ", shape_of(grad_loss));
  return bin_weights.size(0);
}

}  // namespace rsloss
