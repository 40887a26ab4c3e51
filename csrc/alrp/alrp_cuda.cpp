// Torch glue of the aLRP finalize on CUDA. The kernels are in alrp_kernels.cu.
#include <optional>
#include <tuple>

#include "alrp/alrp_kernels.cuh"
#include "common/cuda_glue.h"
#include "ranking/ranking_finalize_glue.h"

namespace rsloss {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> alrp_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                         Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                         double delta, double gradient_scale) {
  const char* op = "alrp_finalize";
  check_logits(op, logits);
  const CurrentStream stream(logits[0]);
  Finalize finalize = prepare_finalize(op, logits, negatives, ranked, counts, bins, segments, num_segments, delta,
                                       gradient_scale, alrp_workspace_bytes, stream);
  Tensor classification = new_loss(logits[0]);
  Tensor rank = torch::stable::new_empty(logits[0], {ranked.size(1)}, ScalarType::Double);
  check_cuda(op, launch_alrp_finalize(finalize.arguments, output<void>(classification), output<double>(rank)));
  return {classification, rank, finalize.gradients, finalize.lines};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, RSL_CUDA_KEY, m) { m.impl("alrp_finalize.cuda", TORCH_BOX(&alrp_finalize)); }

}  // namespace rsloss
