// The last step of the AP loss on the CPU: loss and gradient tables from ranked positives and bins, in O(P).
#include "ap/ap.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "ranking/ranking_forward_cpu.h"

namespace rsloss {
namespace {

constexpr char kFinalize[] = "average_precision_finalize";

std::tuple<Tensor, Tensor, Tensor> finish(const RankedPositives& positives, bool interpolated) {
  const std::vector<double> sums = sum_over_positives(positives.windows, [](int64_t) { return 1.0; });
  std::vector<double> error(positives.count());
  PositiveTerms terms(positives.count());
  for (const SegmentRange& range : positives.windows.ranges) {
    double smallest = 1;
    for (int64_t i = range.begin; i < range.end; ++i) {
      const double false_positive = positives.false_positive[i];
      error[i] = average_precision_error(sums[i], false_positive, positives.windows.delta);
      if (interpolated) error[i] = smallest = std::min(smallest, error[i]);
      terms.coefficient[i] = average_precision_coefficient(error[i], false_positive);
      terms.first[i] = -error[i];
    }
  }
  Tensor gradients = positives.gradients(terms);
  return {positives.loss(error), gradients, positives.lines(terms)};
}

std::tuple<Tensor, Tensor, Tensor> average_precision_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                              Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                              double delta, double gradient_scale, bool interpolated) {
  return finish({kFinalize, logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale},
                interpolated);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> average_precision_forward(Tensors logits, Tensors targets, Tensors quality,
                                                                             std::optional<Tensor> segments,
                                                                             int64_t num_segments,
                                                                             std::optional<int64_t> max_positives, bool maps,
                                                                             bool background_first, double delta,
                                                                             double gradient_scale, bool interpolated) {
  const auto finish_ranked = [=](const RankedPositives& positives) { return finish(positives, interpolated); };
  return forward_by_steps(kFinalize, finish_ranked, logits, targets, quality, segments, num_segments, max_positives, maps,
                          background_first, delta, gradient_scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("average_precision_finalize.cpp", TORCH_BOX(&average_precision_finalize));
  m.impl("average_precision_forward.cpp", TORCH_BOX(&average_precision_forward));
}

}  // namespace rsloss
