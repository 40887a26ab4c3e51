// Checks of the arguments of the element-wise sigmoid operators, for the CPU and the CUDA glue alike.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "focal/focal.h"

namespace rsloss {

inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

inline bool has_sizes(const Tensor& tensor, const std::vector<int64_t>& sizes) {
  bool matches = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t d = 0; matches && d < sizes.size(); ++d) matches = tensor.size(static_cast<int64_t>(d)) == sizes[d];
  return matches;
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < tensor.dim(); ++d) sizes.push_back(tensor.size(d));
  return sizes;
}

inline void check_sizes(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes,
                        const std::string& meaning) {
  STD_TORCH_CHECK(has_sizes(tensor, sizes), op, ": ", name, " must have ", meaning, ", ", shape_text(sizes), ", got ",
                  shape_of(tensor));
}

// The shape of a level's labels: [..., C] less C, or [B, A, *spatial] of maps [B, A C, *spatial].
inline std::vector<int64_t> row_sizes(const Tensor& level, int64_t classes, bool maps) {
  std::vector<int64_t> sizes = sizes_of(level);
  if (maps) sizes[1] /= classes;
  else sizes.pop_back();
  return sizes;
}

inline void check_focal_number(const char* op, const char* name, const Tensors& values, const Tensors& logits) {
  STD_TORCH_CHECK(values.size() == logits.size(), op, ": ", name, " must hold as many tensors as logits, ", logits.size(),
                  ", got ", values.size());
}

inline void check_focal_level(const char* op, const Tensor& level, int64_t classes, bool maps) {
  if (maps) {
    STD_TORCH_CHECK(level.dim() >= 2 && level.size(1) % classes == 0, op,
                    ": logits must have shape [B, A C, *spatial] with the ", classes, " classes of class_table, got shape ",
                    shape_of(level));
  } else {
    STD_TORCH_CHECK(level.dim() >= 1 && level.size(level.dim() - 1) == classes, op, ": logits must have the ", classes,
                    " classes of class_table as last dimension, got shape ", shape_of(level));
  }
}

// What every operator gets. Of the class table only the shape is looked at.
inline void check_focal_levels(const char* op, const Tensors& logits, const Tensors& targets, const Tensors& qualities,
                               const Tensors& weights, const Tensor& class_table, const std::optional<Tensor>& normalizer,
                               int64_t modulator, bool maps) {
  STD_TORCH_CHECK(!logits.empty(), op, ": logits must hold at least one tensor, got none");
  const Tensor& first = logits[0];
  check_focal_number(op, "targets", targets, logits);
  if (!qualities.empty()) check_focal_number(op, "qualities", qualities, logits);
  if (!weights.empty()) check_focal_number(op, "weights", weights, logits);
  check_placement(op, "class_table", class_table, first);
  check_dtype(op, "class_table", class_table, ScalarType::Double);
  STD_TORCH_CHECK(class_table.dim() == 2 && class_table.size(0) == kClassTableRows && class_table.size(1) >= 1, op,
                  ": class_table must have shape [3, C] with C at least 1, got ", shape_of(class_table));
  if (normalizer) {
    check_placement(op, "normalizer", *normalizer, first);
    check_floating(op, "normalizer", *normalizer);
    check_sizes(op, "normalizer", *normalizer, {}, "no dimensions");
  }
  STD_TORCH_CHECK(modulator >= 0 && modulator < kFocalModulators, op, ": modulator must be within 0..",
                  static_cast<int>(kFocalModulators) - 1, ", got ", modulator);
  const int64_t classes = class_table.size(1);
  const bool has_labels = !is_floating(targets[0].scalar_type());
  STD_TORCH_CHECK(qualities.empty() || has_labels, op, ": qualities must be empty with dense targets, got ", qualities.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    const Tensor &level = logits[i], &target = targets[i];
    check_floating(op, "logits", level);
    check_dtype(op, "logits", level, first.scalar_type());
    check_placement(op, "logits", level, first);
    check_focal_level(op, level, classes, maps);
    const std::vector<int64_t> rows = row_sizes(level, classes, maps);
    check_placement(op, "targets", target, first);
    if (has_labels) {
      STD_TORCH_CHECK(target.scalar_type() == ScalarType::Int || target.scalar_type() == ScalarType::Long, op,
                      ": targets must be int32 or int64, got ", toString(target.scalar_type()));
      check_sizes(op, "targets", target, rows, "one class index per row");
    } else {
      check_floating(op, "targets", target);
      check_sizes(op, "targets", target, sizes_of(level), "the shape of logits");
    }
    if (!qualities.empty()) {
      check_placement(op, "qualities", qualities[i], first);
      check_floating(op, "qualities", qualities[i]);
      check_sizes(op, "qualities", qualities[i], rows, "the shape of targets");
    }
    if (!weights.empty()) {
      check_placement(op, "weights", weights[i], first);
      check_floating(op, "weights", weights[i]);
      if (!has_sizes(weights[i], rows))
        check_sizes(op, "weights", weights[i], sizes_of(level),
                    "one number per row, " + shape_text(rows) + ", or the shape of logits");
    }
  }
}

// One gradient for the loss, or one for each element.
inline void check_focal_grads(const char* op, const Tensors& grads, const Tensors& logits) {
  STD_TORCH_CHECK(!grads.empty(), op, ": grads must hold one tensor of no dimensions, or one per level, got none");
  for (size_t i = 0; i < grads.size(); ++i) {
    check_placement(op, "grads", grads[i], logits[0]);
    check_floating(op, "grads", grads[i]);
    if (grads.size() == 1 && grads[i].dim() == 0) continue;
    check_focal_number(op, "grads", grads, logits);
    check_sizes(op, "grads", grads[i], sizes_of(logits[i]), "the shape of logits");
  }
}

}  // namespace rsloss
