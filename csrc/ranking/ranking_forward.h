// All steps of a ranking loss in one call, for where nothing happens between them. The same for the CPU and the CUDA library,
// each with operators of its own.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "common/checks.h"

namespace rsloss {

std::tuple<Tensor, Tensor, Tensor> ranking_collect(Tensors logits, Tensors targets, Tensors quality,
                                                   std::optional<Tensor> segments, int64_t num_segments,
                                                   std::optional<int64_t> max_positives, bool maps, bool background_first);
std::tuple<Tensor, Tensor> ranking_bin(Tensors logits, Tensor negatives, Tensor positives, Tensor counts,
                                       std::optional<Tensor> segments, int64_t num_segments, double delta);

// (losses..., gradients, lines) -> (losses..., negatives, counts, gradients, lines)
template <class Outputs, size_t... losses>
auto insert_tables(const Outputs& outputs, const Tensor& negatives, const Tensor& counts, std::index_sequence<losses...>) {
  constexpr size_t count = sizeof...(losses);
  return std::make_tuple(std::get<losses>(outputs)..., negatives, counts, std::get<count>(outputs),
                         std::get<count + 1>(outputs));
}

// bin, finalize: the operators of these names, or what does the same; options: the own arguments of the latter.
template <class Bin, class Finalize, class... Options>
auto ranking_forward(const Bin& bin, const Finalize& finalize, const Tensors& logits, const Tensors& targets,
                     const Tensors& quality, const std::optional<Tensor>& segments, int64_t num_segments,
                     std::optional<int64_t> max_positives, bool maps, bool background_first, double delta,
                     double gradient_scale, Options... options) {
  const auto [positives, negatives, counts] =
      ranking_collect(logits, targets, quality, segments, num_segments, max_positives, maps, background_first);
  const auto [ranked, bins] = bin(logits, negatives, positives, counts, segments, num_segments, delta);
  const auto outputs =
      finalize(logits, negatives, ranked, counts, bins, segments, num_segments, delta, gradient_scale, options...);
  return insert_tables(outputs, negatives, counts, std::make_index_sequence<std::tuple_size_v<decltype(outputs)> - 2>());
}

}  // namespace rsloss
