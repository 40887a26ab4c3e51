// GHM-C and GHM-R on the CPU: one threaded pass for counts and losses by bin, a finalize in O(bins), one pass for the gradient.
// Allocates the outputs, and O(bins) besides.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "ghm/ghm.h"
#include "ghm/ghm_blocks.h"
#include "ghm/ghm_checks.h"

#define RSL_SIMD_BODY "ghm/ghm_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kMostChunks = 64;
constexpr int64_t kSmallestChunk = 16 * kBlock;

struct Chunk {
  size_t level;
  int64_t begin;
  int64_t end;
};

// Pieces whose number does not grow with the elements, cut by the sizes alone: their sums are added in order, whatever threads
// there are.
std::vector<Chunk> cut_into_chunks(const std::vector<GhmLevel>& levels) {
  int64_t elements = 0;
  for (const GhmLevel& level : levels) elements += level.count;
  const int64_t blocks = (elements / kMostChunks + kBlock) / kBlock, size = std::max(kSmallestChunk, blocks * kBlock);
  std::vector<Chunk> chunks;
  for (size_t level = 0; level < levels.size(); ++level)
    for (int64_t begin = 0; begin < levels[level].count; begin += size)
      chunks.push_back({level, begin, std::min(begin + size, levels[level].count)});
  return chunks;
}

std::vector<GhmLevel> view_levels(const Tensors& preds, const Tensors& targets, const Tensors& weights, bool background_first) {
  std::vector<GhmLevel> levels;
  for (size_t i = 0; i < preds.size(); ++i) {
    const Tensor& pred = preds[i];
    GhmLevel level{};
    level.preds = pred.const_data_ptr();
    level.targets = targets[i].const_data_ptr();
    level.target_type = targets[i].scalar_type();
    level.count = pred.numel();
    level.first_label = background_first ? 1 : 0;
    if (!weights.empty()) {
      level.weights = weights[i].const_data_ptr();
      level.weight_type = weights[i].scalar_type();
      level.row_weights = are_by_row(weights[i], pred);
    }
    level.shape = {1, 1};
    if (is_class_index(level.target_type)) level.shape = index_shape_of(pred, targets[i]);
    else if (level.row_weights) level.shape = index_shape_of(pred, weights[i]);
    levels.push_back(level);
  }
  return levels;
}

GhmEdges make_edges(int64_t bins, const std::optional<double>& mu) {
  GhmEdges edges;
  edges.bins = static_cast<int>(bins);
  edges.is_regression = mu.has_value();
  edges.mu = mu.value_or(0);
  // Tables are read in whole vectors.
  const int64_t read = std::min<int64_t>(kMostBins, (bins + 63) / 64 * 64);
  for (int bin = 0; bin < read; ++bin) {
    const int k = bin + 1;
    const bool is_inside = k < edges.bins;
    const double hard = is_inside ? hard_threshold(k, edges.bins) : kNaN;
    // Nothing is above the last bin: NaN compares as false.
    const double other = !is_inside ? kNaN : mu ? regression_threshold(k, edges.bins, *mu) : soft_threshold(k, edges.bins);
    edges.above[bin] = other;
    edges.above[kMostBins + bin] = hard;
    edges.float_above[bin] = is_inside ? float_at_or_above(mu ? other : hard) : static_cast<float>(kNaN);
  }
  return edges;
}

// Calls body(chunk number) for all, on as many threads as it pays.
template <class Body>
void for_chunks(const std::vector<Chunk>& chunks, const Body& body) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  share_items(count, task_count(count, 1), body);
}

// The histogram: counts by bin and the valid elements with NaN, then losses by bin and 0.
std::vector<double> sum_by_bin(const Tensors& preds, const Tensors& targets, const Tensors& weights, int64_t bins,
                               const std::optional<double>& mu, bool background_first) {
  const std::vector<GhmLevel> levels = view_levels(preds, targets, weights, background_first);
  const std::vector<Chunk> chunks = cut_into_chunks(levels);
  const GhmEdges edges = make_edges(bins, mu);
  const size_t columns = static_cast<size_t>(bins) + 1;
  std::vector<double> parts(chunks.size() * 2 * columns);
  dispatch_floating(preds[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    for_chunks(chunks, [&](int64_t i) {
      const Chunk& chunk = chunks[i];
      const GhmLevel& level = levels[chunk.level];
      const In* data = static_cast<const In*>(level.preds);
      BinSum sums[kMostBins];
      const int64_t nan_count = mu ? RSL_ISA_CALL(sum_chunk<true>, level, data, chunk.begin, chunk.end, edges, sums)
                                   : RSL_ISA_CALL(sum_chunk<false>, level, data, chunk.begin, chunk.end, edges, sums);
      double* part = parts.data() + i * 2 * columns;
      for (int64_t bin = 0; bin < bins; ++bin) {
        part[bin] = sums[bin][1];
        part[columns + bin] = sums[bin][0];
      }
      part[bins] = static_cast<double>(nan_count);
    });
  });
  std::vector<double> total(2 * columns);
  for (size_t i = 0; i < parts.size(); ++i) total[i % (2 * columns)] += parts[i];
  return total;
}

double floating_value(const Tensor& tensor, int64_t i) {
  double value = 0;
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    value = static_cast<double>(widen(static_cast<const decltype(tag)*>(tensor.const_data_ptr())[i]));
  });
  return value;
}

void set_floating(const Tensor& tensor, int64_t i, double value) {
  if (tensor.scalar_type() == ScalarType::Double) static_cast<double*>(tensor.mutable_data_ptr())[i] = value;
  else static_cast<float*>(tensor.mutable_data_ptr())[i] = static_cast<float>(value);
}

// Loss, state after it and weights of the bins.
using Finalized = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Finalized finalize(const double* counts, const Tensor& pred, const std::optional<Tensor>& acc_sum,
                   const std::optional<Tensor>& num_updates, int64_t bins, double momentum, bool count_empty_bins,
                   double gradient_scale) {
  const double* losses = counts + bins + 1;
  const int64_t* updates = num_updates ? static_cast<const int64_t*>(num_updates->const_data_ptr()) : nullptr;

  const auto filled = std::count_if(counts, counts + bins, [](double count) { return count > 0; });
  const double in_use = static_cast<double>(count_empty_bins ? bins : filled);
  const ScalarType loss_type = pred.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = new_cpu_tensor({}, loss_type);
  Tensor new_acc_sum = new_cpu_tensor({bins}, acc_sum ? acc_sum->scalar_type() : ScalarType::Double);
  Tensor new_updates = new_cpu_tensor({num_updates ? bins : 0}, ScalarType::Long);
  Tensor bin_weights = new_cpu_tensor({bins}, ScalarType::Double);
  double* scaled = static_cast<double*>(bin_weights.mutable_data_ptr());
  std::vector<BinDensity> before(bins), after(bins);
  double sum = 0;
  for (int64_t b = 0; b < bins; ++b) {
    before[b] = {acc_sum ? floating_value(*acc_sum, b) : counts[b], updates ? updates[b] : 0, 0};
    after[b] =
        update_density(counts[b], before[b].acc_sum, before[b].num_updates, momentum, count_empty_bins, updates != nullptr);
    const double weight = bin_weight(counts[b], after[b].density, in_use);
    if (counts[b] > 0) sum += weight * losses[b];
    scaled[b] = weight * gradient_scale;
  }
  if (counts[bins] > 0) sum = kNaN;

  const bool is_kept = filled > 0 && std::isfinite(sum);
  for (int64_t b = 0; b < bins; ++b) {
    const BinDensity& state = is_kept ? after[b] : before[b];
    set_floating(new_acc_sum, b, state.acc_sum);
    if (updates) static_cast<int64_t*>(new_updates.mutable_data_ptr())[b] = state.num_updates;
  }
  set_floating(loss, 0, sum);
  return {loss, new_acc_sum, new_updates, bin_weights};
}

Tensor ghm_histogram(Tensors preds, Tensors targets, Tensors weights, int64_t bins, std::optional<double> mu,
                     bool background_first) {
  const char* op = "ghm_histogram";
  check_ghm_levels(op, preds, targets, weights, mu);
  check_ghm_bins(op, bins);
  const std::vector<double> total = sum_by_bin(preds, targets, weights, bins, mu, background_first);
  Tensor histogram = new_cpu_tensor({kHistogramRows, bins + 1}, ScalarType::Double);
  std::copy(total.begin(), total.end(), static_cast<double*>(histogram.mutable_data_ptr()));
  return histogram;
}

Finalized ghm_finalize(Tensors preds, Tensors targets, Tensors weights, Tensor histogram, std::optional<Tensor> acc_sum,
                       std::optional<Tensor> num_updates, int64_t bins, std::optional<double> mu, bool, double momentum,
                       bool count_empty_bins, double gradient_scale) {
  const char* op = "ghm_finalize";
  check_ghm_levels(op, preds, targets, weights, mu);
  check_ghm_bins(op, bins);
  check_ghm_histogram(op, histogram, preds[0], bins);
  check_ghm_state(op, acc_sum, num_updates, preds[0], bins, momentum);
  const double* counts = static_cast<const double*>(histogram.const_data_ptr());
  return finalize(counts, preds[0], acc_sum, num_updates, bins, momentum, count_empty_bins, gradient_scale);
}

Finalized ghm_forward(Tensors preds, Tensors targets, Tensors weights, std::optional<Tensor> acc_sum,
                      std::optional<Tensor> num_updates, int64_t bins, std::optional<double> mu, bool background_first,
                      double momentum, bool count_empty_bins) {
  const char* op = "ghm_forward";
  check_ghm_levels(op, preds, targets, weights, mu);
  check_ghm_bins(op, bins);
  check_ghm_state(op, acc_sum, num_updates, preds[0], bins, momentum);
  const std::vector<double> total = sum_by_bin(preds, targets, weights, bins, mu, background_first);
  return finalize(total.data(), preds[0], acc_sum, num_updates, bins, momentum, count_empty_bins, 1);
}

Tensors ghm_backward(Tensors preds, Tensors targets, Tensors weights, Tensor bin_weights, Tensor grad_loss,
                     std::optional<double> mu, bool background_first) {
  const char* op = "ghm_backward";
  check_ghm_levels(op, preds, targets, weights, mu);
  const int64_t bins = check_ghm_backward(op, bin_weights, grad_loss, preds[0]);
  const std::vector<GhmLevel> levels = view_levels(preds, targets, weights, background_first);
  const std::vector<Chunk> chunks = cut_into_chunks(levels);
  const GhmEdges edges = make_edges(bins, mu);
  GhmFactors factors{};
  const double* of_bins = static_cast<const double*>(bin_weights.const_data_ptr());
  const double upstream = floating_value(grad_loss, 0);
  for (int64_t b = 0; b < bins; ++b) {
    factors.exact[b] = of_bins[b] * upstream;
    factors.rounded[b] = static_cast<float>(factors.exact[b]);
  }
  Tensors gradients;
  for (const Tensor& level : preds) gradients.push_back(new_cpu_tensor_like(level));
  dispatch_floating(preds[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    for_chunks(chunks, [&](int64_t i) {
      const Chunk& chunk = chunks[i];
      const GhmLevel& level = levels[chunk.level];
      const In* data = static_cast<const In*>(level.preds);
      In* gradient = static_cast<In*>(gradients[chunk.level].mutable_data_ptr());
      if (mu) RSL_ISA_CALL(write_chunk<true>, level, data, chunk.begin, chunk.end, edges, factors, gradient);
      else RSL_ISA_CALL(write_chunk<false>, level, data, chunk.begin, chunk.end, edges, factors, gradient);
    });
  });
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("ghm_histogram.cpp", TORCH_BOX(&ghm_histogram));
  m.impl("ghm_finalize.cpp", TORCH_BOX(&ghm_finalize));
  m.impl("ghm_forward.cpp", TORCH_BOX(&ghm_forward));
  m.impl("ghm_backward.cpp", TORCH_BOX(&ghm_backward));
}

}  // namespace rsloss
