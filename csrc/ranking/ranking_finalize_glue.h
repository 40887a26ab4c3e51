// Torch glue that the finalizers of all ranking losses share on CUDA: checks, tables, and the arguments of the launchers.
#pragma once

#include "common/cuda_glue.h"
#include "ranking/ranking.h"
#include "ranking/ranking_checks.h"
#include "ranking/ranking_kernels.cuh"

namespace rsloss {

struct C10_HIDDEN Finalize {
  Tensor gradients;
  Tensor lines;
  Tensor workspace;
  FinalizeArguments arguments;
};

// Call with the device of the logits current. workspace_bytes: of the loss, (type of the logits, capacity, segments).
inline Finalize prepare_finalize(const char* op, const Tensors& logits, const Tensor& negatives, const Tensor& ranked,
                                 const Tensor& counts, const Tensor& bins, const std::optional<Tensor>& segments,
                                 int64_t num_segments, double delta, double gradient_scale,
                                 int64_t (*workspace_bytes)(Type, int64_t, int32_t), cudaStream_t stream) {
  check_delta(op, delta);
  const int64_t capacity =
      check_collected(op, logits, negatives, counts, segments, num_segments, "ranked", ranked, kRecordRows);
  check_table(op, "bins", bins, logits[0], ScalarType::Long, 2, 2 * capacity + 1);
  const Type type = type_of(logits[0]);
  const int32_t segment_count = static_cast<int32_t>(num_segments);
  Finalize result = {torch::stable::new_empty(logits[0], {kGradientRows, capacity}, ScalarType::Double),
                     torch::stable::new_empty(logits[0], {kLineRows, 2 * capacity}, ScalarType::Double),
                     new_workspace(logits[0], workspace_bytes(type, capacity, segment_count)),
                     {}};
  result.arguments = {type,
                      input<double>(ranked),
                      input<int64_t>(counts),
                      input<int64_t>(bins),
                      capacity,
                      segment_count,
                      delta,
                      gradient_scale,
                      output<double>(result.gradients),
                      output<double>(result.lines),
                      output<void>(result.workspace),
                      stream};
  return result;
}

inline Tensor new_loss(const Tensor& logits) { return torch::stable::new_empty(logits, {}, loss_type(logits)); }

}  // namespace rsloss
