// Torch glue of balanced group softmax on CUDA: checks, allocation, device and stream. The kernels are in
// group_softmax_kernels.cu.
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda_glue.h"
#include "group_softmax/group_softmax_checks.h"
#include "group_softmax/group_softmax_kernels.cuh"

namespace rsloss {
namespace {

using Numbers = std::vector<int64_t>;

GroupLabels labels_of(const Tensor& labels, const Tensor& class_columns) {
  return {labels.const_data_ptr(), type_of(labels), input<int>(class_columns), labels.size(0)};
}

GroupRows rows_of(const Tensor& logits, const Tensor& weights) {
  return {logits.const_data_ptr(), type_of(logits), weights.const_data_ptr(), type_of(weights)};
}

Tensor group_softmax_sample(Tensor labels, Tensor class_columns, std::optional<Tensor> keys, Numbers starts, Numbers others,
                            int64_t background_group, bool background_first, double others_ratio) {
  const char* op = "group_softmax_sample";
  check_defined(op, "labels", labels);
  const GroupLayout layout =
      read_groups_with_background(op, class_columns, labels, starts, others, background_group, background_first);
  check_group_sampling(op, labels, keys, layout.groups, others_ratio);
  const CurrentStream stream(labels);
  Tensor weights = torch::stable::new_empty(labels, {layout.groups, labels.size(0)}, ScalarType::Float);
  check_cuda(op, launch_group_softmax_sample(layout, labels_of(labels, class_columns), keys ? input<float>(*keys) : nullptr,
                                             others_ratio, output<float>(weights), stream));
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> group_softmax_forward(Tensor logits, Tensor labels, Tensor class_columns, Tensor weights,
                                                         Numbers starts, Numbers others, bool background_first) {
  const char* op = "group_softmax_forward";
  const GroupLayout layout = check_group_rows(op, logits, labels, class_columns, weights, starts, others, background_first);
  const CurrentStream stream(logits);
  const int64_t rows = logits.size(0), groups = layout.groups;
  int64_t bytes = 0;
  check_cuda(op, group_softmax_workspace_bytes(layout, rows, &bytes));
  Tensor workspace = new_workspace(logits, bytes);
  Tensor losses = torch::stable::new_empty(logits, {groups}, loss_type(logits));
  Tensor averages = torch::stable::new_empty(logits, {groups}, ScalarType::Double);
  Tensor row_tables = torch::stable::new_empty(logits, {kRowTables, groups, rows}, loss_type(logits));
  check_cuda(
      op, launch_group_softmax_forward(layout, labels_of(labels, class_columns), rows_of(logits, weights), output<void>(losses),
                                       output<double>(averages), output<void>(row_tables), output<void>(workspace), stream));
  return {losses, averages, row_tables};
}

Tensor group_softmax_backward(Tensor logits, Tensor labels, Tensor class_columns, Tensor weights, Tensor averages,
                              Tensor row_tables, Tensor grad_losses, Numbers starts, Numbers others, bool background_first) {
  const char* op = "group_softmax_backward";
  const GroupLayout layout = check_group_rows(op, logits, labels, class_columns, weights, starts, others, background_first);
  check_group_backward(op, averages, row_tables, grad_losses, logits, layout.groups);
  const CurrentStream stream(logits);
  Tensor gradient = torch::stable::empty_like(logits);
  check_cuda(op,
             launch_group_softmax_backward(layout, labels_of(labels, class_columns), rows_of(logits, weights),
                                           input<double>(averages), row_tables.const_data_ptr(), grad_losses.const_data_ptr(),
                                           type_of(grad_losses), output<void>(gradient), stream));
  return gradient;
}

Tensor group_softmax_scores(Tensor logits, Tensor class_columns, Numbers starts, Numbers others, int64_t background_group,
                            bool background_first) {
  const char* op = "group_softmax_scores";
  check_defined(op, "logits", logits);
  const GroupLayout layout =
      read_groups_with_background(op, class_columns, logits, starts, others, background_group, background_first);
  check_group_logits(op, logits, layout.columns());
  const CurrentStream stream(logits);
  Tensor scores = torch::stable::new_empty(logits, {logits.size(0), layout.classes + 1}, logits.scalar_type());
  check_cuda(op, launch_group_softmax_scores(layout, input<int>(class_columns), logits.const_data_ptr(), type_of(logits),
                                             logits.size(0), output<void>(scores), stream));
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) {
  m.impl("group_softmax_sample.cuda", TORCH_BOX(&group_softmax_sample));
  m.impl("group_softmax_forward.cuda", TORCH_BOX(&group_softmax_forward));
  m.impl("group_softmax_backward.cuda", TORCH_BOX(&group_softmax_backward));
  m.impl("group_softmax_scores.cuda", TORCH_BOX(&group_softmax_scores));
}

}  // namespace rsloss
