// Torch glue of gradient harmonizing on CUDA: checks, allocation, device and stream. The kernels are in ghm_kernels.cu.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda_glue.h"
#include "ghm/ghm_checks.h"
#include "ghm/ghm_kernels.cuh"

namespace rsloss {
namespace {

// The levels of checked arguments.
std::vector<GhmDeviceLevel> levels_of(const Tensors& preds, const Tensors& targets, const Tensors& weights) {
  std::vector<GhmDeviceLevel> levels;
  for (size_t i = 0; i < preds.size(); ++i) {
    GhmDeviceLevel level = {};
    level.preds = preds[i].const_data_ptr();
    level.targets = targets[i].const_data_ptr();
    level.targets_type = type_of(targets[i]);
    level.weights = weights.empty() ? nullptr : weights[i].const_data_ptr();
    level.weights_type = weights.empty() ? Type::kFloat : type_of(weights[i]);
    level.weights_by_row = !weights.empty() && are_by_row(weights[i], preds[i]);
    level.elements = preds[i].numel();
    level.shape = {1, 1};
    if (is_class_index(targets[i].scalar_type())) level.shape = index_shape_of(preds[i], targets[i]);
    else if (level.weights_by_row) level.shape = index_shape_of(preds[i], weights[i]);
    level.shape.classes = std::max<int64_t>(1, level.shape.classes);
    levels.push_back(level);
  }
  return levels;
}

GhmProblem problem_of(const Tensors& preds, const std::vector<GhmDeviceLevel>& levels, int64_t bins, std::optional<double> mu,
                      bool background_first) {
  return {levels.data(),   static_cast<int>(levels.size()), type_of(preds[0]), static_cast<int>(bins), mu.value_or(0),
          background_first};
}

Tensor ghm_histogram(Tensors preds, Tensors targets, Tensors weights, int64_t bins, std::optional<double> mu,
                     bool background_first) {
  const char* op = "ghm_histogram";
  check_ghm_levels(op, preds, targets, weights, mu);
  check_ghm_bins(op, bins);
  const CurrentStream stream(preds[0]);
  const std::vector<GhmDeviceLevel> levels = levels_of(preds, targets, weights);
  const GhmProblem problem = problem_of(preds, levels, bins, mu, background_first);
  int64_t bytes = 0;
  check_cuda(op, ghm_histogram_workspace_bytes(problem, &bytes));
  Tensor workspace = new_workspace(preds[0], bytes);
  Tensor histogram = torch::stable::new_empty(preds[0], {kHistogramRows, bins + 1}, ScalarType::Double);
  check_cuda(op, launch_ghm_histogram(problem, output<double>(histogram), output<void>(workspace), stream));
  return histogram;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ghm_finalize(Tensors preds, Tensors targets, Tensors weights, Tensor histogram,
                                                        std::optional<Tensor> acc_sum, std::optional<Tensor> num_updates,
                                                        int64_t bins, std::optional<double> mu, bool, double momentum,
                                                        bool count_empty_bins, double gradient_scale) {
  const char* op = "ghm_finalize";
  check_ghm_levels(op, preds, targets, weights, mu);
  check_ghm_bins(op, bins);
  check_ghm_histogram(op, histogram, preds[0], bins);
  check_ghm_state(op, acc_sum, num_updates, preds[0], bins, momentum);
  const CurrentStream stream(preds[0]);
  const ScalarType state_type = acc_sum ? acc_sum->scalar_type() : ScalarType::Double;
  Tensor loss = torch::stable::new_empty(preds[0], {}, loss_type(preds[0]));
  Tensor new_acc_sum = torch::stable::new_empty(preds[0], {bins}, state_type);
  Tensor new_num_updates = torch::stable::new_empty(preds[0], {num_updates ? bins : 0}, ScalarType::Long);
  Tensor bin_weights = torch::stable::new_empty(preds[0], {bins}, ScalarType::Double);
  GhmFinalizeArguments arguments = {};
  arguments.histogram = input<double>(histogram);
  arguments.acc_sum = acc_sum ? acc_sum->const_data_ptr() : nullptr;
  arguments.num_updates = num_updates ? input<int64_t>(*num_updates) : nullptr;
  arguments.state_type = type_of(new_acc_sum);
  arguments.loss_type = type_of(loss);
  arguments.bins = static_cast<int>(bins);
  arguments.momentum = momentum;
  arguments.count_empty_bins = count_empty_bins;
  arguments.gradient_scale = gradient_scale;
  arguments.loss = output<void>(loss);
  arguments.new_acc_sum = output<void>(new_acc_sum);
  arguments.new_num_updates = output<int64_t>(new_num_updates);
  arguments.bin_weights = output<double>(bin_weights);
  check_cuda(op, launch_ghm_finalize(arguments, stream));
  return {loss, new_acc_sum, new_num_updates, bin_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ghm_forward(Tensors preds, Tensors targets, Tensors weights,
                                                       std::optional<Tensor> acc_sum, std::optional<Tensor> num_updates,
                                                       int64_t bins, std::optional<double> mu, bool background_first,
                                                       double momentum, bool count_empty_bins) {
  const char* op = "ghm_forward";
  check_ghm_levels(op, preds, targets, weights, mu);
  check_ghm_bins(op, bins);
  check_ghm_state(op, acc_sum, num_updates, preds[0], bins, momentum);
  Tensor histogram = ghm_histogram(preds, targets, weights, bins, mu, background_first);
  return ghm_finalize(preds, targets, weights, histogram, acc_sum, num_updates, bins, mu, background_first, momentum,
                      count_empty_bins, 1);
}

Tensors ghm_backward(Tensors preds, Tensors targets, Tensors weights, Tensor bin_weights, Tensor grad_loss,
                     std::optional<double> mu, bool background_first) {
  const char* op = "ghm_backward";
  check_ghm_levels(op, preds, targets, weights, mu);
  const int64_t bins = check_ghm_backward(op, bin_weights, grad_loss, preds[0]);
  const CurrentStream stream(preds[0]);
  std::vector<GhmDeviceLevel> levels = levels_of(preds, targets, weights);
  Tensors gradients;
  for (size_t i = 0; i < preds.size(); ++i) {
    gradients.push_back(torch::stable::empty_like(preds[i]));
    levels[i].gradients = output<void>(gradients[i]);
  }
  const GhmProblem problem = problem_of(preds, levels, bins, mu, background_first);
  check_cuda(op,
             launch_ghm_backward(problem, input<double>(bin_weights), grad_loss.const_data_ptr(), type_of(grad_loss), stream));
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) {
  m.impl("ghm_histogram.cuda", TORCH_BOX(&ghm_histogram));
  m.impl("ghm_finalize.cuda", TORCH_BOX(&ghm_finalize));
  m.impl("ghm_forward.cuda", TORCH_BOX(&ghm_forward));
  m.impl("ghm_backward.cuda", TORCH_BOX(&ghm_backward));
}

}  // namespace rsloss
