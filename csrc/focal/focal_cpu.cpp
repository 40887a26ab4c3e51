// The element-wise sigmoid losses on the CPU: one threaded pass for the loss and the sums of classes, one for single losses or
// for gradients. Allocates the outputs, and O(C) besides.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "focal/focal.h"
#include "focal/focal_blocks.h"
#include "focal/focal_checks.h"

#define RSL_SIMD_BODY "focal/focal_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

constexpr int64_t kMostChunks = 64;
constexpr int64_t kSmallestChunk = 16 * kBlock;  // elements
constexpr int64_t kSumsPerTask = 16384;

// The arguments that all three operators begin with.
struct Arguments {
  const Tensors& logits;
  const Tensors& targets;
  const Tensors& qualities;
  const Tensors& weights;
  const Tensor& class_table;
  const std::optional<Tensor>& normalizer;
  int64_t modulator;
  bool maps;
  bool background_first;
  std::optional<int64_t> ignore_index;
  double scale;
};

double number_in(const Tensor& tensor) {
  double value = 0;
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    value = static_cast<double>(widen(*static_cast<const decltype(tag)*>(tensor.const_data_ptr())));
  });
  return value;
}

double factor_of(const Arguments& arguments) {
  return arguments.normalizer ? arguments.scale / number_in(*arguments.normalizer) : arguments.scale;
}

// grads: empty, or of every element.
std::vector<FocalLevel> view_levels(const Arguments& arguments, const Tensors& grads) {
  const int64_t classes = arguments.class_table.size(1);
  std::vector<FocalLevel> levels;
  for (size_t i = 0; i < arguments.logits.size(); ++i) {
    const Tensor &logits = arguments.logits[i], &target = arguments.targets[i];
    FocalLevel level{};
    level.logits = logits.const_data_ptr();
    level.targets = target.const_data_ptr();
    level.target_type = target.scalar_type();
    level.has_labels = !is_floating(level.target_type);
    if (!arguments.qualities.empty()) {
      level.qualities = arguments.qualities[i].const_data_ptr();
      level.quality_type = arguments.qualities[i].scalar_type();
    }
    if (!arguments.weights.empty()) {
      level.weights = arguments.weights[i].const_data_ptr();
      level.weight_type = arguments.weights[i].scalar_type();
      level.row_weights = has_sizes(arguments.weights[i], row_sizes(logits, classes, arguments.maps));
    }
    if (!grads.empty()) {
      level.grads = grads[i].const_data_ptr();
      level.grad_type = grads[i].scalar_type();
    }
    int64_t inner = 1;
    for (int64_t d = 2; arguments.maps && d < logits.dim(); ++d) inner *= logits.size(d);
    const int64_t count = logits.numel();
    level.layout =
        classes == 1 ? FocalLayout{1, 1, count} : FocalLayout{count == 0 ? 0 : count / (classes * inner), classes, inner};
    levels.push_back(level);
  }
  return levels;
}

// Owns what a FocalTable points to.
class TableColumns {
 public:
  FocalTable view{};

  // has_floats: logits of float32 or narrower.
  TableColumns(const Arguments& arguments, double factor, bool has_floats) {
    const int64_t classes = arguments.class_table.size(1);
    view.table = static_cast<const double*>(arguments.class_table.const_data_ptr());
    view.rule = {classes, arguments.background_first ? 1 : 0, arguments.ignore_index.value_or(-1)};
    view.modulator = static_cast<FocalModulator>(arguments.modulator);
    view.factor = factor;
    view.common_gamma = common_gamma(classes);
    const double* negative = view.table + kNegativeWeight * classes;
    view.has_one_negative_weight =
        std::all_of(negative, negative + classes, [&](double other) { return other == negative[0]; });
    // Losses of any gamma are multiplied by 2^96 (focal_background_simd.h).
    const double largest = view.common_gamma < 0 ? 0x1p31 : 1e20;
    view.has_float_negative_weight = std::all_of(negative, negative + classes, [largest](double other) {
      return other == 0 || (std::fabs(other) > 1e-20 && std::fabs(other) < largest);
    });
    // Rows that fill whole vectors where some do.
    const int64_t most = kBlock / classes, whole = kLanes / std::gcd(classes, int64_t{kLanes});
    view.rows_per_block = most >= whole ? most / whole * whole : most;
    const int64_t entries = classes * std::max<int64_t>(view.rows_per_block, 1);
    view.entries = entries;
    view.columns_size = (entries + kBlock) / kLanes * kLanes;
    fill_columns(classes, has_floats);
    view.columns = {doubles_[0].data(), doubles_[1].data(), doubles_[2].data(), floats_[0].data(),
                    floats_[1].data(),  floats_[2].data(),  floats_[3].data(),  floats_[4].data()};
    view.live_negative = live_[0].data();
    view.live_positive = live_[1].data();
    view.live = live_[2].data();
  }

  // The table of losses for 16-bit logits, where it serves and there are so many elements that it pays.
  template <class In>
  void add_narrow_losses(int64_t elements) {
    if constexpr (sizeof(In) == 2) {
      const auto bits_of = [](float x) {
        const In narrow(x);
        uint16_t bits;
        std::memcpy(&bits, &narrow, sizeof bits);
        return bits;
      };
      const int first = bits_of(-0x1p-8f), count = bits_of(-kFarthestBackground) - first + 1;
      if (view.common_gamma < 0 || !view.has_one_negative_weight || elements < 64 * count) return;
      narrow_losses_.resize(count + kLanes + 1);  // whole vectors are written, then the 0 behind the last
      view.narrow = {static_cast<uint16_t>(first), static_cast<uint16_t>(count), narrow_losses_.data()};
      RSL_ISA_CALL(fill_narrow_losses<In>, view, narrow_losses_.data());
    }
  }

 private:
  std::vector<double> doubles_[3];
  std::vector<float> floats_[5];
  std::vector<uint64_t> live_[3];
  std::vector<double> narrow_losses_;

  int common_gamma(int64_t classes) const {
    const double* gamma = view.table;
    const bool is_common = std::all_of(gamma, gamma + classes, [&](double other) { return other == gamma[0]; });
    return is_common && (gamma[0] == 0 || gamma[0] == 1 || gamma[0] == 2) ? static_cast<int>(gamma[0]) : -1;
  }

  void fill_columns(int64_t classes, bool has_floats) {
    const ClassTableRow rows[] = {kClassGamma, kPositiveWeight, kNegativeWeight};
    for (int column = 0; column < 3; ++column) {
      const double* of_classes = view.table + rows[column] * classes;
      const double factor = column == 0 ? 1 : view.factor;
      doubles_[column].assign(view.columns_size, 0.0);
      double* entries = doubles_[column].data();
      std::transform(of_classes, of_classes + classes, entries, [factor](double value) { return value * factor; });
      for (int64_t first = classes; first < view.entries; first += classes) std::copy_n(entries, classes, entries + first);
    }
    fill_live(live_[0], view.table + kNegativeWeight * classes, classes);
    fill_live(live_[1], view.table + kPositiveWeight * classes, classes);
    live_[2] = live_[0];
    for (size_t word = 0; word < live_[2].size(); ++word) live_[2][word] |= live_[1][word];
    if (!has_floats) return;
    round_column(doubles_[0], floats_[0], &floats_[1]);
    round_column(doubles_[1], floats_[2], nullptr);
    round_column(doubles_[2], floats_[3], &floats_[4]);
  }

  // Bits of the entries whose weight is not 0.
  void fill_live(std::vector<uint64_t>& words, const double* weights, int64_t classes) {
    words.assign(view.entries / 64 + kBlockWords, 0);
    const bool all = std::none_of(weights, weights + classes, [](double weight) { return weight == 0; });
    for (int64_t word = 0; all && word * 64 < view.entries; ++word)
      words[word] = view.entries - word * 64 < 64 ? (uint64_t{1} << view.entries % 64) - 1 : ~uint64_t{0};
    for (int64_t first = 0; !all && first < view.entries; first += classes)
      for (int64_t c = 0; c < classes; ++c)
        words[(first + c) / 64] |= static_cast<uint64_t>(weights[c] != 0) << (first + c) % 64;
  }

  // lost: what rounding leaves, if that is wanted.
  static void round_column(const std::vector<double>& exact, std::vector<float>& rounded, std::vector<float>* lost) {
    rounded.resize(exact.size());
    std::transform(exact.begin(), exact.end(), rounded.begin(), [](double x) { return static_cast<float>(x); });
    if (lost == nullptr) return;
    lost->resize(exact.size());
    std::transform(exact.begin(), exact.end(), rounded.begin(), lost->begin(),
                   [](double x, float near) { return static_cast<float>(x - static_cast<double>(near)); });
  }
};

struct Chunk {
  size_t level;
  int64_t begin;  // strips
  int64_t end;
  int64_t first_class;
  int64_t last_class;
  int64_t sums_at;  // how many numbers stand before its sums, [2, classes of the chunk]

  int64_t classes() const { return last_class - first_class; }
};

bool level_is_map(const FocalLevel& level) { return level.layout.inner > 1 || level.layout.classes == 1; }

// Pieces whose number does not grow with the elements, cut by the sizes alone: their sums are added in order, whatever threads
// there are.
std::vector<Chunk> cut_into_chunks(const Arguments& arguments, const std::vector<FocalLevel>& levels, const FocalTable& table) {
  const int64_t elements = count_elements(arguments.logits);
  const int64_t most = limit_by_memory(kMostChunks, table.rule.classes * static_cast<int64_t>(2 * sizeof(double)));
  const int64_t wanted = std::max(kSmallestChunk, elements / most + 1);
  std::vector<Chunk> chunks;
  int64_t sums_at = 0;
  for (size_t i = 0; i < levels.size(); ++i) {
    const FocalLayout& layout = levels[i].layout;
    const int64_t rows = std::max<int64_t>(table.rows_per_block, 1);
    const MapStrips parts = map_strips(layout);
    const int64_t strips =
        level_is_map(levels[i]) ? layout.outer * parts.row_parts * parts.class_parts : (layout.outer + rows - 1) / rows;
    if (strips == 0) continue;
    const int64_t of_strip = std::max<int64_t>(1, arguments.logits[i].numel() / strips),
                  step = (wanted + of_strip - 1) / of_strip;
    for (int64_t begin = 0; begin < strips; begin += step) {
      const int64_t end = std::min(begin + step, strips), part = begin / parts.class_parts;
      Chunk chunk = {i, begin, end, 0, layout.classes, sums_at};
      if (level_is_map(levels[i]) && part == (end - 1) / parts.class_parts) {
        chunk.first_class = (begin - part * parts.class_parts) * parts.class_step;
        chunk.last_class = std::min((end - part * parts.class_parts) * parts.class_step, layout.classes);
      }
      sums_at += kClassSumRows * chunk.classes();
      chunks.push_back(chunk);
    }
  }
  return chunks;
}

// Calls body(chunk number) for all, on as many threads as it pays.
template <class Body>
void for_chunks(const std::vector<Chunk>& chunks, const Body& body) {
  const int64_t count = static_cast<int64_t>(chunks.size());
  share_items(count, task_count(count, 1), body);
}

// The sums of a chunk as its blocks add to them, by entry of the columns or by class, to P and N of each of its classes.
void add_by_class(const std::vector<double>& sums, int64_t classes, const Chunk& chunk, double* result) {
  const int64_t entries = static_cast<int64_t>(sums.size()) / kClassSumRows;
  for (int64_t row = 0; row < kClassSumRows; ++row, result += chunk.classes()) {
    const double* of_row = sums.data() + row * entries;
    std::copy(of_row + chunk.first_class, of_row + chunk.last_class, result);
    for (int64_t first = classes; first < entries; first += classes)
      for (int64_t i = first; i < std::min(first + classes, entries); ++i) result[i - first] += of_row[i];
  }
}

// P and N of all chunks, in their order; by_class: [2, classes], zeros.
void add_chunks(const std::vector<Chunk>& chunks, const double* sums, int64_t classes, double* by_class) {
  const int64_t tasks = task_count(chunks.empty() ? 0 : chunks.back().sums_at, kSumsPerTask);
  run_tasks(tasks, [&](int64_t task) {
    const int64_t begin = task_begin(classes, tasks, task), end = task_begin(classes, tasks, task + 1);
    for (const Chunk& chunk : chunks) {
      const int64_t first = std::max(begin, chunk.first_class), last = std::min(end, chunk.last_class);
      for (int64_t row = 0; row < kClassSumRows; ++row) {
        const double* of_row = sums + chunk.sums_at + row * chunk.classes();
        for (int64_t c = first; c < last; ++c) by_class[row * classes + c] += of_row[c - chunk.first_class];
      }
    }
  });
}

std::tuple<Tensor, Tensor> focal_forward(Tensors logits, Tensors targets, Tensors qualities, Tensors weights,
                                         Tensor class_table, std::optional<Tensor> normalizer, int64_t modulator, bool maps,
                                         bool background_first, std::optional<int64_t> ignore_index, double scale,
                                         bool class_sums) {
  const Arguments arguments{logits,    targets, qualities,        weights,      class_table, normalizer,
                            modulator, maps,    background_first, ignore_index, scale};
  check_focal_levels("focal_forward", logits, targets, qualities, weights, class_table, normalizer, modulator, maps);
  const std::vector<FocalLevel> levels = view_levels(arguments, {});
  TableColumns columns(arguments, 1, logits[0].scalar_type() != ScalarType::Double);
  const FocalTable& table = columns.view;
  const std::vector<Chunk> chunks = cut_into_chunks(arguments, levels, table);
  const int64_t classes = table.rule.classes;
  std::vector<double> losses(chunks.size());
  const bool has_sums = class_sums && !chunks.empty();
  const std::unique_ptr<double[]> chunk_sums(
      new double[has_sums ? chunks.back().sums_at + kClassSumRows * chunks.back().classes() : 0]);
  dispatch_floating(logits[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    if (!class_sums) columns.add_narrow_losses<In>(count_elements(logits));
    for_chunks(chunks, [&](int64_t i) {
      const Chunk& chunk = chunks[i];
      const FocalLevel& level = levels[chunk.level];
      const In* data = static_cast<const In*>(level.logits);
      std::vector<double> sums(class_sums ? kClassSumRows * (level_is_map(level) ? classes : table.columns_size) : 0);
      std::vector<float> pulls(class_sums && !level_is_map(level) ? table.columns_size : 0);
      losses[i] = RSL_ISA_CALL(sum_strips<In>, level, table, data, chunk.begin, chunk.end, class_sums ? sums.data() : nullptr,
                               pulls.data());
      if (class_sums) add_by_class(sums, classes, chunk, chunk_sums.get() + chunk.sums_at);
    });
  });
  const bool is_wide = logits[0].scalar_type() == ScalarType::Double;
  Tensor loss = new_cpu_tensor({}, is_wide ? ScalarType::Double : ScalarType::Float);
  Tensor total_sums =
      class_sums ? new_cpu_tensor({kClassSumRows, classes}, ScalarType::Double) : new_cpu_tensor({0}, ScalarType::Double);
  if (class_sums) {
    double* by_class = static_cast<double*>(total_sums.mutable_data_ptr());
    std::fill_n(by_class, kClassSumRows * classes, 0.0);
    add_chunks(chunks, chunk_sums.get(), classes, by_class);
  }
  const double value = factor_of(arguments) * std::accumulate(losses.begin(), losses.end(), 0.0);
  if (is_wide) *static_cast<double*>(loss.mutable_data_ptr()) = value;
  else *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(value);
  return {loss, total_sums};
}

template <bool kGradient>
Tensors write_levels(const Arguments& arguments, const std::vector<FocalLevel>& levels, const FocalTable& table) {
  const std::vector<Chunk> chunks = cut_into_chunks(arguments, levels, table);
  Tensors outputs;
  for (const Tensor& level : arguments.logits) outputs.push_back(new_cpu_tensor_like(level));
  dispatch_floating(arguments.logits[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    for_chunks(chunks, [&](int64_t i) {
      const Chunk& chunk = chunks[i];
      const FocalLevel& level = levels[chunk.level];
      const In* data = static_cast<const In*>(level.logits);
      In* output = static_cast<In*>(outputs[chunk.level].mutable_data_ptr());
      if constexpr (kGradient) RSL_ISA_CALL(write_strips<true>, level, table, data, chunk.begin, chunk.end, output);
      else RSL_ISA_CALL(write_strips<false>, level, table, data, chunk.begin, chunk.end, output);
    });
  });
  return outputs;
}

Tensors focal_elements(Tensors logits, Tensors targets, Tensors qualities, Tensors weights, Tensor class_table,
                       std::optional<Tensor> normalizer, int64_t modulator, bool maps, bool background_first,
                       std::optional<int64_t> ignore_index, double scale) {
  const Arguments arguments{logits,    targets, qualities,        weights,      class_table, normalizer,
                            modulator, maps,    background_first, ignore_index, scale};
  check_focal_levels("focal_elements", logits, targets, qualities, weights, class_table, normalizer, modulator, maps);
  return write_levels<false>(arguments, view_levels(arguments, {}), TableColumns(arguments, factor_of(arguments), false).view);
}

Tensors focal_backward(Tensors logits, Tensors targets, Tensors qualities, Tensors weights, Tensor class_table,
                       std::optional<Tensor> normalizer, Tensors grads, int64_t modulator, bool maps, bool background_first,
                       std::optional<int64_t> ignore_index, double scale) {
  const Arguments arguments{logits,    targets, qualities,        weights,      class_table, normalizer,
                            modulator, maps,    background_first, ignore_index, scale};
  check_focal_levels("focal_backward", logits, targets, qualities, weights, class_table, normalizer, modulator, maps);
  check_focal_grads("focal_backward", grads, logits);
  const bool is_of_loss = grads[0].dim() == 0;
  const double factor = factor_of(arguments) * (is_of_loss ? number_in(grads[0]) : 1);
  const TableColumns columns(arguments, factor, logits[0].scalar_type() != ScalarType::Double);
  return write_levels<true>(arguments, view_levels(arguments, is_of_loss ? Tensors{} : grads), columns.view);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("focal_forward.cpp", TORCH_BOX(&focal_forward));
  m.impl("focal_elements.cpp", TORCH_BOX(&focal_elements));
  m.impl("focal_backward.cpp", TORCH_BOX(&focal_backward));
}

}  // namespace rsloss
