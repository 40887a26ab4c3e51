// Smooth L1 loss on the CPU: one threaded pass for the loss, for single losses or for gradients. Allocates the outputs, and a
// number per chunk.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "smooth_l1/smooth_l1.h"
#include "smooth_l1/smooth_l1_blocks.h"
#include "smooth_l1/smooth_l1_checks.h"

#define RSL_SIMD_BODY "smooth_l1/smooth_l1_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

constexpr int64_t kMostChunks = 64;
constexpr int64_t kSmallestChunk = 32 * kBlock;

double number_in(const Tensor& tensor) {
  double value = 0;
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    value = static_cast<double>(widen(*static_cast<const decltype(tag)*>(tensor.const_data_ptr())));
  });
  return value;
}

SmoothL1Column column_of(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type(), 1}; }

SmoothL1Problem view(const Tensor& pred, const Tensor& target, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& beta, const std::optional<Tensor>& normalizer, double fixed_beta,
                     double scale) {
  SmoothL1Problem problem{};
  problem.pred = column_of(pred);
  problem.target = column_of(target);
  if (weight) {
    problem.weight = column_of(*weight);
    if (weight->dim() < pred.dim()) problem.weight.row = pred.size(pred.dim() - 1);
  }
  problem.beta = smooth_l1_beta(beta ? number_in(*beta) : fixed_beta);
  problem.factor = normalizer ? scale / number_in(*normalizer) : scale;
  return problem;
}

// In float where nothing is wider.
bool is_wide(const SmoothL1Problem& problem) {
  const auto is_double = [](const SmoothL1Column& column) {
    return column.data != nullptr && column.type == ScalarType::Double;
  };
  return is_double(problem.pred) || is_double(problem.target) || is_double(problem.weight) || is_double(problem.grad);
}

// Calls body(chunk, begin, end) for pieces cut by the size alone, on as many threads as it pays. Returns their number.
template <class Body>
void for_chunks(int64_t elements, int64_t size, const Body& body) {
  const int64_t chunks = (elements + size - 1) / size;
  share_items(chunks, task_count(chunks, 1), [&](int64_t i) { body(i, i * size, std::min((i + 1) * size, elements)); });
}

int64_t chunk_size(int64_t elements) {
  const int64_t blocks = (elements / kMostChunks + kBlock) / kBlock;
  return std::max(kSmallestChunk, blocks * kBlock);
}

Tensors smooth_l1_forward(Tensor pred, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> beta,
                          std::optional<Tensor> normalizer, double fixed_beta, double scale) {
  check_smooth_l1("smooth_l1_forward", pred, target, weight, beta, normalizer, fixed_beta);
  const SmoothL1Problem problem = view(pred, target, weight, beta, normalizer, fixed_beta, scale);
  const int64_t elements = pred.numel(), size = chunk_size(elements);
  double sums[kMostChunks + 1] = {};
  const bool wide = is_wide(problem);
  for_chunks(elements, size, [&](int64_t chunk, int64_t begin, int64_t end) {
    sums[chunk] =
        wide ? RSL_ISA_CALL(sum_losses<double>, problem, begin, end) : RSL_ISA_CALL(sum_losses<float>, problem, begin, end);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  const bool is_double = pred.scalar_type() == ScalarType::Double;
  Tensor loss = new_cpu_tensor({}, is_double ? ScalarType::Double : ScalarType::Float);
  if (is_double) *static_cast<double*>(loss.mutable_data_ptr()) = total * problem.factor;
  else *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total * problem.factor);
  return {loss};
}

Tensors smooth_l1_elements(Tensor pred, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> beta,
                           std::optional<Tensor> normalizer, double fixed_beta, double scale) {
  check_smooth_l1("smooth_l1_elements", pred, target, weight, beta, normalizer, fixed_beta);
  const SmoothL1Problem problem = view(pred, target, weight, beta, normalizer, fixed_beta, scale);
  Tensor losses = new_cpu_tensor_like(pred);
  const SmoothL1Column output = {losses.mutable_data_ptr(), losses.scalar_type(), 1};
  const bool wide = is_wide(problem);
  for_chunks(pred.numel(), chunk_size(pred.numel()), [&](int64_t, int64_t begin, int64_t end) {
    if (wide) RSL_ISA_CALL(write_losses<double>, problem, begin, end, output);
    else RSL_ISA_CALL(write_losses<float>, problem, begin, end, output);
  });
  return {losses};
}

Tensor smooth_l1_backward(Tensor pred, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> beta,
                          std::optional<Tensor> normalizer, Tensor grad, double fixed_beta, double scale) {
  const char* op = "smooth_l1_backward";
  check_smooth_l1(op, pred, target, weight, beta, normalizer, fixed_beta);
  check_smooth_l1_grad(op, grad, pred);
  SmoothL1Problem problem = view(pred, target, weight, beta, normalizer, fixed_beta, scale);
  if (grad.dim() == 0) problem.factor *= number_in(grad);
  else problem.grad = column_of(grad);
  problem.factor = smooth_l1_factor(problem.factor, problem.beta);
  Tensor gradient = new_cpu_tensor_like(pred);
  const SmoothL1Column output = {gradient.mutable_data_ptr(), gradient.scalar_type(), 1};
  const bool wide = is_wide(problem);
  for_chunks(pred.numel(), chunk_size(pred.numel()), [&](int64_t, int64_t begin, int64_t end) {
    if (wide) RSL_ISA_CALL(write_gradients<double>, problem, begin, end, output);
    else RSL_ISA_CALL(write_gradients<float>, problem, begin, end, output);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("smooth_l1_forward.cpp", TORCH_BOX(&smooth_l1_forward));
  m.impl("smooth_l1_elements.cpp", TORCH_BOX(&smooth_l1_elements));
  m.impl("smooth_l1_backward.cpp", TORCH_BOX(&smooth_l1_backward));
}

}  // namespace rsloss
