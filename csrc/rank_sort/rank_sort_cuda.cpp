// Torch glue of the Rank & Sort finalize on CUDA. The kernels are in rank_sort_kernels.cu.
#include <optional>
#include <tuple>

#include "common/cuda_glue.h"
#include "rank_sort/rank_sort_kernels.cuh"
#include "ranking/ranking_finalize_glue.h"
#include "ranking/ranking_forward.h"

namespace rsloss {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> rank_sort_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                              Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                              double delta, double gradient_scale, bool /*upstream_parity*/) {
  const char* op = "rank_sort_finalize";
  check_logits(op, logits);
  const CurrentStream stream(logits[0]);
  Finalize finalize = prepare_finalize(op, logits, negatives, ranked, counts, bins, segments, num_segments, delta,
                                       gradient_scale, rank_sort_workspace_bytes, stream);
  Tensor ranking = new_loss(logits[0]);
  Tensor sorting = new_loss(logits[0]);
  check_cuda(op, launch_rank_sort_finalize(finalize.arguments, output<void>(ranking), output<void>(sorting)));
  return {ranking, sorting, finalize.gradients, finalize.lines};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rank_sort_forward(Tensors logits, Tensors targets, Tensors quality,
                                                                             std::optional<Tensor> segments,
                                                                             int64_t num_segments,
                                                                             std::optional<int64_t> max_positives, bool maps,
                                                                             bool background_first, double delta,
                                                                             double gradient_scale, bool upstream_parity) {
  return ranking_forward(ranking_bin, rank_sort_finalize, logits, targets, quality, segments, num_segments, max_positives, maps,
                         background_first, delta, gradient_scale, upstream_parity);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) {
  m.impl("rank_sort_finalize.cuda", TORCH_BOX(&rank_sort_finalize));
  m.impl("rank_sort_forward.cuda", TORCH_BOX(&rank_sort_forward));
}

}  // namespace rsloss
