// Checks of the arguments of the group softmax operators, for the CPU and the CUDA glue alike.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"
#include "group_softmax/group_softmax.h"

namespace rsloss {

inline void check_group_labels(const char* op, const Tensor& labels, const Tensor& like, int64_t rows) {
  check_placement(op, "labels", labels, like);
  const ScalarType type = labels.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": labels must be int32 or int64, got ",
                  toString(type));
  STD_TORCH_CHECK(labels.dim() == 1 && (rows < 0 || labels.size(0) == rows), op, ": labels must have shape [",
                  rows < 0 ? std::string("N") : std::to_string(rows), "], got ", shape_of(labels));
}

// A table of `rows` numbers per group.
inline void check_of_groups(const char* op, const char* name, const Tensor& table, const Tensor& like, int64_t groups,
                            int64_t rows) {
  check_placement(op, name, table, like);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) == groups && table.size(1) == rows, op, ": ", name, " must have shape [",
                  groups, ", ", rows, "], got ", shape_of(table));
}

// Checks the groups and returns them in the form that kernels take; background_group -1: not asked for.
inline GroupLayout read_groups(const char* op, const Tensor& class_columns, const Tensor& like,
                               const std::vector<int64_t>& starts, const std::vector<int64_t>& others, int64_t background_group,
                               bool background_first) {
  const int64_t groups = static_cast<int64_t>(others.size());
  STD_TORCH_CHECK(groups >= 1 && groups <= kMostGroups, op, ": others must hold a column per group, 1..", kMostGroups,
                  " of them, got ", groups);
  STD_TORCH_CHECK(static_cast<int64_t>(starts.size()) == groups + 1, op, ": starts must hold ", groups + 1,
                  " columns, one more than others, got ", starts.size());
  GroupLayout layout{};
  layout.groups = static_cast<int>(groups);
  layout.background_group = static_cast<int>(background_group);
  layout.background_first = background_first;
  STD_TORCH_CHECK(starts[0] == 0, op, ": starts must ascend from 0, got ", starts[0], " first");
  int64_t with_column = 0;
  for (int64_t g = 0; g < groups; ++g) {
    STD_TORCH_CHECK(starts[g] < starts[g + 1] && starts[g + 1] < INT32_MAX, op,
                    ": starts must ascend from 0 and stay below 2^31, got ", starts[g], " before ", starts[g + 1]);
    STD_TORCH_CHECK(others[g] == -1 || (others[g] >= starts[g] && others[g] < starts[g + 1]), op,
                    ": others must be -1 or a column of its group, got ", others[g], " for group ", g, " of ", starts[g], "..",
                    starts[g + 1] - 1);
    layout.starts[g + 1] = static_cast<int>(starts[g + 1]);
    layout.others[g] = static_cast<int>(others[g]);
    with_column += others[g] != -1 ? 1 : 0;
  }
  STD_TORCH_CHECK(background_group >= -1 && background_group < groups, op, ": background_group must be within 0..", groups - 1,
                  ", got ", background_group);
  check_vector(op, "class_columns", class_columns, like, ScalarType::Int, starts[groups] - with_column);
  layout.classes = static_cast<int>(class_columns.size(0) - 1);
  return layout;
}

// Returns the layout for an operator that needs the background group.
inline GroupLayout read_groups_with_background(const char* op, const Tensor& class_columns, const Tensor& like,
                                               const std::vector<int64_t>& starts, const std::vector<int64_t>& others,
                                               int64_t background_group, bool background_first) {
  STD_TORCH_CHECK(background_group >= 0, op, ": background_group must be within 0..", static_cast<int64_t>(others.size()) - 1,
                  ", got ", background_group);
  return read_groups(op, class_columns, like, starts, others, background_group, background_first);
}

inline void check_group_logits(const char* op, const Tensor& logits, int64_t columns) {
  check_floating(op, "logits", logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) == columns, op, ": logits must have shape [N, ", columns,
                  "], the columns of all groups, got ", shape_of(logits));
  check_placement(op, "logits", logits, logits);
}

// What forward and backward both get.
inline GroupLayout check_group_rows(const char* op, const Tensor& logits, const Tensor& labels, const Tensor& class_columns,
                                    const Tensor& weights, const std::vector<int64_t>& starts,
                                    const std::vector<int64_t>& others, bool background_first) {
  check_defined(op, "logits", logits);
  const GroupLayout layout = read_groups(op, class_columns, logits, starts, others, -1, background_first);
  check_group_logits(op, logits, layout.columns());
  check_group_labels(op, labels, logits, logits.size(0));
  check_floating(op, "weights", weights);
  check_of_groups(op, "weights", weights, logits, layout.groups, logits.size(0));
  return layout;
}

inline void check_group_backward(const char* op, const Tensor& averages, const Tensor& row_tables, const Tensor& grad_losses,
                                 const Tensor& logits, int64_t groups) {
  check_vector(op, "averages", averages, logits, ScalarType::Double, groups);
  check_placement(op, "row_tables", row_tables, logits);
  check_dtype(op, "row_tables", row_tables,
              logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
  STD_TORCH_CHECK(row_tables.dim() == 3 && row_tables.size(0) == static_cast<int64_t>(kRowTables) &&
                      row_tables.size(1) == groups && row_tables.size(2) == logits.size(0),
                  op, ": row_tables must have shape [", static_cast<int64_t>(kRowTables), ", ", groups, ", ", logits.size(0),
                  "], got ", shape_of(row_tables));
  check_floating(op, "grad_losses", grad_losses);
  check_placement(op, "grad_losses", grad_losses, logits);
  STD_TORCH_CHECK(grad_losses.dim() == 1 && grad_losses.size(0) == groups, op, ": grad_losses must have shape [", groups,
                  "], got ", shape_of(grad_losses));
}

inline void check_group_sampling(const char* op, const Tensor& labels, const std::optional<Tensor>& keys, int64_t groups,
                                 double others_ratio) {
  STD_TORCH_CHECK(others_ratio >= 0, op, ": others_ratio must be at least 0, got ", others_ratio);
  check_group_labels(op, labels, labels, -1);
  if (keys) {
    check_dtype(op, "keys", *keys, ScalarType::Float);
    check_of_groups(op, "keys", *keys, labels, groups, labels.size(0));
  }
  STD_TORCH_CHECK(keys || others_ratio == 0 || std::isinf(others_ratio), op, ": keys must be given for others_ratio ",
                  others_ratio, ", got none");
}

}  // namespace rsloss
