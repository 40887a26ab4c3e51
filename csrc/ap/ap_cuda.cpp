// Torch glue of the AP loss's finalize on CUDA. The kernels are in ap_kernels.cu.
#include <optional>
#include <tuple>

#include "ap/ap_kernels.cuh"
#include "common/cuda_glue.h"
#include "ranking/ranking_finalize_glue.h"
#include "ranking/ranking_forward.h"

namespace rsloss {
namespace {

std::tuple<Tensor, Tensor, Tensor> average_precision_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                              Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                              double delta, double gradient_scale, bool interpolated) {
  const char* op = "average_precision_finalize";
  check_logits(op, logits);
  const CurrentStream stream(logits[0]);
  Finalize finalize = prepare_finalize(op, logits, negatives, ranked, counts, bins, segments, num_segments, delta,
                                       gradient_scale, average_precision_workspace_bytes, stream);
  Tensor loss = new_loss(logits[0]);
  check_cuda(op, launch_average_precision_finalize(finalize.arguments, interpolated, output<void>(loss)));
  return {loss, finalize.gradients, finalize.lines};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> average_precision_forward(Tensors logits, Tensors targets, Tensors quality,
                                                                             std::optional<Tensor> segments,
                                                                             int64_t num_segments,
                                                                             std::optional<int64_t> max_positives, bool maps,
                                                                             bool background_first, double delta,
                                                                             double gradient_scale, bool interpolated) {
  return ranking_forward(ranking_bin, average_precision_finalize, logits, targets, quality, segments, num_segments,
                         max_positives, maps, background_first, delta, gradient_scale, interpolated);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) {
  m.impl("average_precision_finalize.cuda", TORCH_BOX(&average_precision_finalize));
  m.impl("average_precision_forward.cuda", TORCH_BOX(&average_precision_forward));
}

}  // namespace rsloss
