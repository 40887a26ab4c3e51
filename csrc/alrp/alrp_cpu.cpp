// The aLRP loss on the CPU: its last step, loss, ranks and gradient tables from ranked positives and bins, in O(P); and all
// steps in one call, between them the regression losses, after them the ranks in the order of these.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "alrp/alrp.h"
#include "common/floating_cpu.h"
#include "ranking/ranking_forward_cpu.h"

namespace rsloss {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

std::tuple<Tensor, Tensor, Tensor, Tensor> finish(const RankedPositives& positives) {
  const double* regression = positives.quality();
  const std::vector<double> sums = sum_over_positives(positives.windows, [](int64_t) { return 1.0; });
  const std::vector<double> losses = sum_over_positives(positives.windows, [&](int64_t j) { return regression[j]; });
  const double self = step_over_width(0, positives.windows.slope);
  std::vector<double> error(positives.count()), rank(positives.count());
  PositiveTerms terms(positives.count());
  for (int64_t i = 0; i < positives.count(); ++i) {
    const LocalisationTerms term =
        localisation_terms(sums[i], losses[i] - self * regression[i], positives.false_positive[i], positives.windows.delta);
    error[i] = term.error;
    rank[i] = term.rank;
    terms.coefficient[i] = term.coefficient;
    terms.first[i] = term.gradient;
  }
  Tensor gradients = positives.gradients(terms);
  return {positives.loss(error), positives.statistics(rank), gradients, positives.lines(terms)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> alrp_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                         Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                         double delta, double gradient_scale) {
  return finish({"alrp_finalize", logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale});
}

// Makes the losses the qualities of the records, [4, P]; a positive whose loss is not finite becomes an invalid one.
void put_losses(const Tensor& losses, double* records, int64_t count) {
  // In the words of the public function: this is where the positives are first counted.
  if (losses.numel() != count)
    throw std::runtime_error("alrp_loss: regression_losses must have one value per positive, " + std::to_string(count) +
                             ", got " + std::to_string(losses.numel()));
  dispatch_floating(losses.scalar_type(), [&](auto tag) {
    const auto* data = static_cast<const decltype(tag)*>(losses.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) {
      const double loss = static_cast<double>(data[i]);
      records[kQuality * count + i] = loss;
      if (!std::isfinite(loss)) records[kLogit * count + i] = kNaN;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> alrp_forward(Tensors logits, Tensors targets,
                                                                                Tensor regression_losses, bool is_per_row,
                                                                                bool background_first, double delta) {
  const char* op = "alrp_forward";
  check_logits(op, logits);
  check_delta(op, delta);
  STD_TORCH_CHECK(logits.size() == 1, op, ": logits must hold one tensor, got ", logits.size());
  check_placement(op, "regression_losses", regression_losses, logits[0]);
  check_floating(op, "regression_losses", regression_losses);
  if (is_per_row) {
    STD_TORCH_CHECK(targets.size() == 1 && is_label(targets[0].scalar_type()), op,
                    ": targets must be class indices where there is a regression loss per row, got dense ones");
    STD_TORCH_CHECK(shape_of(regression_losses) == shape_of(targets[0]), op,
                    ": regression_losses must have the shape of targets, ", shape_of(targets[0]), ", got ",
                    shape_of(regression_losses));
  } else {
    STD_TORCH_CHECK(regression_losses.dim() == 1, op,
                    ": regression_losses must have one dimension, unless there is one per row, got shape ",
                    shape_of(regression_losses));
  }
  const Tensors quality = is_per_row ? Tensors{regression_losses} : Tensors{};
  const auto [positives, negatives, counts] =
      ranking_collect(logits, targets, quality, std::nullopt, 1, std::nullopt, false, background_first);
  const int64_t count = positives.size(1), size = regression_losses.numel();
  double* records = static_cast<double*>(positives.mutable_data_ptr());
  if (!is_per_row) put_losses(regression_losses, records, count);
  // Ranking carries their numbers along, the places in `regression_losses`, in place of the flat indices, which ascend alike.
  double* index = records + kIndex * count;
  const std::vector<double> flat_index(index, index + count);
  std::iota(index, index + count, 0.0);
  std::optional<Windows> windows;
  const auto [ranked, bins] = rank_and_bin(logits, negatives, positives, counts, std::nullopt, 1, delta, windows);
  double* number = static_cast<double*>(ranked.mutable_data_ptr()) + kIndex * count;
  std::vector<int64_t> place(count);
  const int64_t classes = is_per_row ? std::max<int64_t>(logits[0].size(logits[0].dim() - 1), 1) : 1;
  for (int64_t i = 0; i < count; ++i) {
    place[i] = static_cast<int64_t>(number[i]);
    number[i] = flat_index[place[i]];
    if (is_per_row) place[i] = static_cast<int64_t>(number[i]) / classes;
  }
  const auto [classification, ranks, gradients, lines] =
      finish({op, logits, negatives, ranked, counts, bins, std::nullopt, 1, delta, 1.0, std::move(windows)});

  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < regression_losses.dim(); ++d) sizes.push_back(regression_losses.size(d));
  Tensor rank = new_cpu_tensor(sizes, ScalarType::Double), order = new_cpu_tensor(sizes, ScalarType::Long);
  double* rank_of = static_cast<double*>(rank.mutable_data_ptr());
  int64_t* next = static_cast<int64_t*>(order.mutable_data_ptr());
  const double* of_ranked = static_cast<const double*>(ranks.const_data_ptr());
  std::fill_n(rank_of, size, 0.0);
  std::vector<bool> has_positive(size);
  for (int64_t i = 0; i < count; ++i) {
    rank_of[place[i]] = of_ranked[i];
    has_positive[place[i]] = true;
  }
  for (int64_t i = 0; i < size; ++i)
    if (!has_positive[i]) *next++ = i;
  std::copy(place.begin(), place.end(), next);
  return {classification, rank, order, negatives, counts, gradients, lines};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("alrp_finalize.cpp", TORCH_BOX(&alrp_finalize));
  m.impl("alrp_forward.cpp", TORCH_BOX(&alrp_forward));
}

}  // namespace rsloss
