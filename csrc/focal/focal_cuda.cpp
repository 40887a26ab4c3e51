// Torch glue of the element-wise sigmoid losses on CUDA: checks, allocation, device and stream. The kernels are in
// focal_kernels.cu.
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda_glue.h"
#include "focal/focal_checks.h"
#include "focal/focal_kernels.cuh"

namespace rsloss {
namespace {

using Levels = std::vector<FocalDeviceLevel>;

// The arguments that all three operators share.
struct Arguments {
  const Tensors& logits;
  const Tensors& targets;
  const Tensors& qualities;
  const Tensors& weights;
  const Tensor& class_table;
  const std::optional<Tensor>& normalizer;
  int64_t modulator;
  bool maps;
  bool background_first;
  std::optional<int64_t> ignore_index;
  double scale;
};

void check(const char* op, const Arguments& arguments) {
  check_focal_levels(op, arguments.logits, arguments.targets, arguments.qualities, arguments.weights, arguments.class_table,
                     arguments.normalizer, arguments.modulator, arguments.maps);
}

// The levels of checked arguments.
Levels levels_of(const Arguments& arguments) {
  const int64_t classes = arguments.class_table.size(1);
  Levels levels;
  for (size_t i = 0; i < arguments.logits.size(); ++i) {
    const Tensor& logits = arguments.logits[i];
    FocalDeviceLevel level = {};
    level.logits = logits.const_data_ptr();
    level.targets = arguments.targets[i].const_data_ptr();
    level.targets_type = type_of(arguments.targets[i]);
    if (!arguments.qualities.empty()) {
      level.qualities = arguments.qualities[i].const_data_ptr();
      level.qualities_type = type_of(arguments.qualities[i]);
    }
    if (!arguments.weights.empty()) {
      level.weights = arguments.weights[i].const_data_ptr();
      level.weights_type = type_of(arguments.weights[i]);
      level.weights_by_row = has_sizes(arguments.weights[i], row_sizes(logits, classes, arguments.maps));
    }
    level.inner = 1;
    for (int64_t d = 2; arguments.maps && d < logits.dim(); ++d) level.inner *= logits.size(d);
    level.outer = logits.numel() == 0 ? 0 : logits.numel() / (classes * level.inner);
    levels.push_back(level);
  }
  return levels;
}

FocalProblem problem_of(const Arguments& arguments, const Levels& levels) {
  FocalProblem problem = {};
  problem.levels = levels.data();
  problem.num_levels = static_cast<int>(levels.size());
  problem.logits_type = type_of(arguments.logits[0]);
  problem.classes = arguments.class_table.size(1);
  problem.class_table = input<double>(arguments.class_table);
  problem.modulator = static_cast<FocalModulator>(arguments.modulator);
  problem.labels = {problem.classes, arguments.background_first ? 1 : 0, arguments.ignore_index.value_or(-1)};
  if (arguments.normalizer) {
    problem.normalizer = arguments.normalizer->const_data_ptr();
    problem.normalizer_type = type_of(*arguments.normalizer);
  }
  problem.scale = arguments.scale;
  return problem;
}

// An output like each tensor of the logits.
Tensors new_outputs(const Arguments& arguments, Levels* levels) {
  Tensors outputs;
  for (size_t i = 0; i < levels->size(); ++i) {
    outputs.push_back(torch::stable::empty_like(arguments.logits[i]));
    (*levels)[i].outputs = output<void>(outputs[i]);
  }
  return outputs;
}

std::tuple<Tensor, Tensor> focal_forward(Tensors logits, Tensors targets, Tensors qualities, Tensors weights,
                                         Tensor class_table, std::optional<Tensor> normalizer, int64_t modulator, bool maps,
                                         bool background_first, std::optional<int64_t> ignore_index, double scale,
                                         bool class_sums) {
  const char* op = "focal_forward";
  const Arguments arguments = {logits,    targets, qualities,        weights,      class_table, normalizer,
                               modulator, maps,    background_first, ignore_index, scale};
  check(op, arguments);
  const CurrentStream stream(logits[0]);
  const Levels levels = levels_of(arguments);
  const FocalProblem problem = problem_of(arguments, levels);
  int64_t bytes = 0;
  check_cuda(op, focal_forward_workspace_bytes(problem, class_sums, &bytes));
  Tensor workspace = new_workspace(logits[0], bytes);
  Tensor loss = torch::stable::new_empty(logits[0], {}, loss_type(logits[0]));
  Tensor sums = class_sums ? torch::stable::new_empty(logits[0], {kClassSumRows, problem.classes}, ScalarType::Double)
                           : torch::stable::new_empty(logits[0], {0}, ScalarType::Double);
  check_cuda(op, launch_focal_forward(problem, output<void>(loss), class_sums ? output<double>(sums) : nullptr,
                                      output<void>(workspace), stream));
  return {loss, sums};
}

Tensors focal_elements(Tensors logits, Tensors targets, Tensors qualities, Tensors weights, Tensor class_table,
                       std::optional<Tensor> normalizer, int64_t modulator, bool maps, bool background_first,
                       std::optional<int64_t> ignore_index, double scale) {
  const char* op = "focal_elements";
  const Arguments arguments = {logits,    targets, qualities,        weights,      class_table, normalizer,
                               modulator, maps,    background_first, ignore_index, scale};
  check(op, arguments);
  const CurrentStream stream(logits[0]);
  Levels levels = levels_of(arguments);
  Tensors losses = new_outputs(arguments, &levels);
  check_cuda(op, launch_focal_elements(problem_of(arguments, levels), stream));
  return losses;
}

Tensors focal_backward(Tensors logits, Tensors targets, Tensors qualities, Tensors weights, Tensor class_table,
                       std::optional<Tensor> normalizer, Tensors grads, int64_t modulator, bool maps, bool background_first,
                       std::optional<int64_t> ignore_index, double scale) {
  const char* op = "focal_backward";
  const Arguments arguments = {logits,    targets, qualities,        weights,      class_table, normalizer,
                               modulator, maps,    background_first, ignore_index, scale};
  check(op, arguments);
  check_focal_grads(op, grads, logits);
  const CurrentStream stream(logits[0]);
  Levels levels = levels_of(arguments);
  Tensors gradients = new_outputs(arguments, &levels);
  // A level of no dimensions cannot be: its last one has the classes.
  const bool is_of_loss = grads.size() == 1 && grads[0].dim() == 0;
  for (size_t i = 0; !is_of_loss && i < levels.size(); ++i) {
    levels[i].grads = grads[i].const_data_ptr();
    levels[i].grads_type = type_of(grads[i]);
  }
  FocalProblem problem = problem_of(arguments, levels);
  if (is_of_loss) {
    problem.grad = grads[0].const_data_ptr();
    problem.grad_type = type_of(grads[0]);
  }
  check_cuda(op, launch_focal_backward(problem, stream));
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) {
  m.impl("focal_forward.cuda", TORCH_BOX(&focal_forward));
  m.impl("focal_elements.cuda", TORCH_BOX(&focal_elements));
  m.impl("focal_backward.cuda", TORCH_BOX(&focal_backward));
}

}  // namespace rsloss
