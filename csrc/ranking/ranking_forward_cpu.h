// All steps of a ranking loss in one call on the CPU.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "ranking/finalize_cpu.h"
#include "ranking/ranking_forward.h"
#include "ranking/windows_cpu.h"

namespace rsloss {

// `ranking_bin`, which leaves the windows of what it ranks in `windows`.
std::tuple<Tensor, Tensor> rank_and_bin(const Tensors& logits, const Tensor& negatives, const Tensor& positives,
                                        const Tensor& counts, const std::optional<Tensor>& segments, int64_t num_segments,
                                        double delta, std::optional<Windows>& windows);

// op: the name of the loss's finalize; finish: from RankedPositives to what that returns.
template <class Finish>
auto forward_by_steps(const char* op, const Finish& finish, const Tensors& logits, const Tensors& targets,
                      const Tensors& quality, const std::optional<Tensor>& segments, int64_t num_segments,
                      std::optional<int64_t> max_positives, bool maps, bool background_first, double delta,
                      double gradient_scale) {
  std::optional<Windows> windows;
  const auto bin = [&](const auto&... arguments) { return rank_and_bin(arguments..., windows); };
  const auto finalize_ranked = [&](const auto&... arguments) {
    return finish(RankedPositives(op, arguments..., std::move(windows)));
  };
  return ranking_forward(bin, finalize_ranked, logits, targets, quality, segments, num_segments, max_positives, maps,
                         background_first, delta, gradient_scale);
}

}  // namespace rsloss
