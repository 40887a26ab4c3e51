// Checks of the arguments of the Seesaw operators.
#pragma once

#include <cmath>
#include <optional>

#include "common/checks.h"
#include "seesaw/seesaw.h"

namespace rsloss {

inline void check_seesaw_number(const char* op, const char* name, double value) {
  STD_TORCH_CHECK(value >= 0 && std::isfinite(value), op, ": ", name, " must be finite and at least 0, got ", value);
}

// A number per row.
inline void check_of_rows(const char* op, const char* name, const Tensor& vector, const Tensor& logits) {
  check_placement(op, name, vector, logits);
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == logits.size(0), op, ": ", name, " must have shape [", logits.size(0),
                  "], got ", shape_of(vector));
}

// What forward and backward both get.
inline void check_seesaw_rows(const char* op, const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& weights,
                              const Tensor& log_counts, double p, double q) {
  check_floating(op, "logits", logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) >= 3, op, ": logits must have shape [N, C + 2] with C at least 1, got ",
                  shape_of(logits));
  check_placement(op, "logits", logits, logits);
  check_defined(op, "labels", labels);
  const ScalarType type = labels.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": labels must be int32 or int64, got ",
                  toString(type));
  check_of_rows(op, "labels", labels, logits);
  if (weights) {
    check_floating(op, "weights", *weights);
    check_of_rows(op, "weights", *weights, logits);
  }
  check_vector(op, "log_counts", log_counts, logits, ScalarType::Double, logits.size(1) - 2);
  check_seesaw_number(op, "p", p);
  check_seesaw_number(op, "q", q);
}

inline void check_seesaw_reduction(const char* op, int64_t reduction, const std::optional<Tensor>& avg_factor,
                                   const Tensor& logits) {
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, op, ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  if (!avg_factor) return;
  check_placement(op, "avg_factor", *avg_factor, logits);
  check_dtype(op, "avg_factor", *avg_factor, ScalarType::Double);
  STD_TORCH_CHECK(avg_factor->dim() == 0, op, ": avg_factor must have shape [], got ", shape_of(*avg_factor));
}

// Of a loss that is one number or a number per row.
inline void check_seesaw_upstream(const char* op, const char* name, const std::optional<Tensor>& grad, const Tensor& logits) {
  if (!grad) return;
  check_floating(op, name, *grad);
  if (grad->dim() == 0) check_placement(op, name, *grad, logits);
  else check_of_rows(op, name, *grad, logits);
}

inline void check_seesaw_backward(const char* op, const Tensor& divisors, const Tensor& row_tables,
                                  const std::optional<Tensor>& grad_objectness, const std::optional<Tensor>& grad_classes,
                                  const Tensor& logits) {
  check_vector(op, "divisors", divisors, logits, ScalarType::Double, 2);
  check_table(op, "row_tables", row_tables, logits, ScalarType::Double, kSeesawTables, logits.size(0));
  check_seesaw_upstream(op, "grad_objectness", grad_objectness, logits);
  check_seesaw_upstream(op, "grad_classes", grad_classes, logits);
}

}  // namespace rsloss
