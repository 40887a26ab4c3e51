// The last step of the aLRP loss on the CPU: loss, ranks and gradient tables from ranked positives and bins, in O(P).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "alrp/alrp.h"
#include "ranking/finalize_cpu.h"

namespace rsloss {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> alrp_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                         Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                         double delta, double gradient_scale) {
  const RankedPositives positives("alrp_finalize", logits, negatives, ranked, counts, bins, segments, num_segments, delta,
                                  gradient_scale);
  const double* regression = positives.quality();
  const std::vector<double> sums = sum_over_positives(positives.windows, [](int64_t) { return 1.0; });
  const std::vector<double> losses = sum_over_positives(positives.windows, [&](int64_t j) { return regression[j]; });
  const double self = step_over_width(0, positives.windows.slope);
  std::vector<double> error(positives.count()), rank(positives.count());
  PositiveTerms terms(positives.count());
  for (int64_t i = 0; i < positives.count(); ++i) {
    const LocalisationTerms term =
        localisation_terms(sums[i], losses[i] - self * regression[i], positives.false_positive[i], delta);
    error[i] = term.error;
    rank[i] = term.rank;
    terms.coefficient[i] = term.coefficient;
    terms.first[i] = term.gradient;
  }
  Tensor gradients = positives.gradients(terms);
  return {positives.loss(error), positives.statistics(rank), gradients, positives.lines(terms)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) { m.impl("alrp_finalize.cpp", TORCH_BOX(&alrp_finalize)); }

}  // namespace rsloss
