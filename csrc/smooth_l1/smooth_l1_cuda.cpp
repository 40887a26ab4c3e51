// Torch glue of smooth L1 loss on CUDA: checks, allocation, device and stream. The kernels are in smooth_l1_kernels.cu.
#include <optional>

#include "common/cuda_glue.h"
#include "smooth_l1/smooth_l1_checks.h"
#include "smooth_l1/smooth_l1_kernels.cuh"

namespace rsloss {
namespace {

// Of checked arguments.
SmoothL1DeviceProblem problem_of(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& weight,
                                 const std::optional<Tensor>& beta, const std::optional<Tensor>& normalizer, double fixed_beta,
                                 double scale) {
  SmoothL1DeviceProblem problem = {};
  problem.pred = pred.const_data_ptr();
  problem.pred_type = type_of(pred);
  problem.target = target.const_data_ptr();
  problem.target_type = type_of(target);
  problem.row = 1;
  if (weight) {
    problem.weight = weight->const_data_ptr();
    problem.weight_type = type_of(*weight);
    if (weight->dim() < pred.dim()) problem.row = pred.size(pred.dim() - 1);
  }
  if (beta) {
    problem.beta = beta->const_data_ptr();
    problem.beta_type = type_of(*beta);
  }
  problem.fixed_beta = fixed_beta;
  if (normalizer) {
    problem.normalizer = normalizer->const_data_ptr();
    problem.normalizer_type = type_of(*normalizer);
  }
  problem.scale = scale;
  problem.elements = pred.numel();
  return problem;
}

Tensors smooth_l1_forward(Tensor pred, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> beta,
                          std::optional<Tensor> normalizer, double fixed_beta, double scale) {
  const char* op = "smooth_l1_forward";
  check_smooth_l1(op, pred, target, weight, beta, normalizer, fixed_beta);
  const CurrentStream stream(pred);
  const SmoothL1DeviceProblem problem = problem_of(pred, target, weight, beta, normalizer, fixed_beta, scale);
  int64_t bytes = 0;
  check_cuda(op, smooth_l1_workspace_bytes(problem, &bytes));
  std::optional<Tensor> workspace;
  if (bytes > 0) workspace = new_workspace(pred, bytes);
  Tensor loss = torch::stable::new_empty(pred, {}, loss_type(pred));
  check_cuda(op, launch_smooth_l1_forward(problem, type_of(loss), output<void>(loss),
                                          workspace ? output<void>(*workspace) : nullptr, stream));
  return {loss};
}

Tensors smooth_l1_elements(Tensor pred, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> beta,
                           std::optional<Tensor> normalizer, double fixed_beta, double scale) {
  const char* op = "smooth_l1_elements";
  check_smooth_l1(op, pred, target, weight, beta, normalizer, fixed_beta);
  const CurrentStream stream(pred);
  Tensor losses = torch::stable::empty_like(pred);
  const SmoothL1DeviceProblem problem = problem_of(pred, target, weight, beta, normalizer, fixed_beta, scale);
  check_cuda(op, launch_smooth_l1_elements(problem, output<void>(losses), stream));
  return {losses};
}

Tensor smooth_l1_backward(Tensor pred, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> beta,
                          std::optional<Tensor> normalizer, Tensor grad, double fixed_beta, double scale) {
  const char* op = "smooth_l1_backward";
  check_smooth_l1(op, pred, target, weight, beta, normalizer, fixed_beta);
  check_smooth_l1_grad(op, grad, pred);
  const CurrentStream stream(pred);
  Tensor gradient = torch::stable::empty_like(pred);
  const SmoothL1DeviceProblem problem = problem_of(pred, target, weight, beta, normalizer, fixed_beta, scale);
  check_cuda(op, launch_smooth_l1_backward(problem, grad.const_data_ptr(), type_of(grad), grad.dim() == 0,
                                           output<void>(gradient), stream));
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) {
  m.impl("smooth_l1_forward.cuda", TORCH_BOX(&smooth_l1_forward));
  m.impl("smooth_l1_elements.cuda", TORCH_BOX(&smooth_l1_elements));
  m.impl("smooth_l1_backward.cuda", TORCH_BOX(&smooth_l1_backward));
}

}  // namespace rsloss
