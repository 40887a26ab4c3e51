// Torch glue of the Rank & Sort finalize on CUDA. The kernels are in rank_sort_kernels.cu.
#include <optional>
#include <tuple>

#include "common/cuda_glue.h"
#include "rank_sort/rank_sort_kernels.cuh"
#include "ranking/ranking.h"
#include "ranking/ranking_checks.h"

namespace rsloss {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> rank_sort_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                              Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                              double delta, double gradient_scale, bool /*upstream_parity*/) {
  const char* op = "rank_sort_finalize";
  check_delta(op, delta);
  const int64_t capacity =
      check_collected(op, logits, negatives, counts, segments, num_segments, "ranked", ranked, kRecordRows);
  check_table(op, "bins", bins, logits[0], ScalarType::Long, 2, 2 * capacity + 1);

  const CurrentStream stream(logits[0]);
  const Type type = type_of(logits[0]);
  Tensor ranking = torch::stable::new_empty(logits[0], {}, loss_type(logits[0]));
  Tensor sorting = torch::stable::new_empty(logits[0], {}, loss_type(logits[0]));
  Tensor gradients = torch::stable::new_empty(logits[0], {kGradientRows, capacity}, ScalarType::Double);
  Tensor lines = torch::stable::new_empty(logits[0], {kLineRows, 2 * capacity}, ScalarType::Double);
  Tensor workspace = new_workspace(logits[0], rank_sort_workspace_bytes(type, capacity));
  check_cuda(op, launch_rank_sort_finalize(type, input<double>(ranked), input<int64_t>(counts), input<int64_t>(bins),
                                           count_elements(logits), capacity, delta, gradient_scale, output<void>(ranking),
                                           output<void>(sorting), output<double>(gradients), output<double>(lines),
                                           output<void>(workspace), stream));
  return {ranking, sorting, gradients, lines};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) {
  m.impl("rank_sort_finalize.cuda", TORCH_BOX(&rank_sort_finalize));
}

}  // namespace rsloss
