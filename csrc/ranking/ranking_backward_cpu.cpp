// The gradient of the logits on the CPU: one threaded pass from the lines, then the positives.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "ranking/patterns_cpu.h"
#include "ranking/ranking.h"
#include "ranking/ranking_checks.h"
#include "ranking/ranking_sweep.h"
#include "ranking/segments_cpu.h"

#define RSL_SIMD_BODY "ranking/ranking_gradient_simd.h"
#include "common/for_each_isa.h"

#define RSL_SIMD_BODY "ranking/pattern_gradients_simd.h"
#include "common/for_each_isa.h"

#include "ranking/pattern_gradients_cpu.h"

namespace rsloss {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double upstream_value(const char* op, const char* name, const std::optional<Tensor>& grad) {
  if (!grad) return 0;
  STD_TORCH_CHECK(grad->dim() == 0 && is_floating(grad->scalar_type()) && grad->is_cpu(), op, ": ", name,
                  " must be a floating 0-d tensor on the CPU, got shape ", shape_of(*grad));
  double value = 0;
  dispatch_floating(grad->scalar_type(),
                    [&](auto tag) { value = static_cast<double>(*static_cast<const decltype(tag)*>(grad->const_data_ptr())); });
  return value;
}

// A cell may hold one line in place of several if that is wrong by at most this share of the largest gradient of a positive.
constexpr double kLineTolerance = 0x1p-26;
// A line is evaluated far inside the range of its type.
constexpr double kSafeFactor = 1e-6;

// Everything a gradient pass reads. table: the operator's lines, [3, columns]. The upstream gradient is folded into the lines,
// unless it is not finite or so large that a line would overflow: then `factor` remains to be applied to every negative.
template <class T>
struct GradientTables {
  GradientTables(const double* table, int64_t columns, const std::vector<SegmentRange>& ranges, PartedEdges<T> breakpoints,
                 double upstream, double largest_positive, int64_t elements)
      : parted(std::move(breakpoints)) {
    const int64_t slots = 2 * count_ranks(ranges);
    const double *value = table + columns, *slope = table + 2 * columns;
    double largest = 0;
    for (int64_t slot = 0; slot < slots; ++slot) largest = std::max({largest, std::fabs(value[slot]), std::fabs(slope[slot])});
    const bool is_folded = std::fabs(upstream) * std::max(largest, 1.0) < kSafeFactor * std::numeric_limits<T>::max();
    const double folded = is_folded ? upstream : 1;
    factor = is_folded ? 1 : upstream;
    exact.reserve(parted.size() + 1);
    exact.push_back({0, 0});
    for (const SegmentRange& range : ranges)
      for (int64_t slot = 2 * range.begin; slot < 2 * range.end; ++slot)
        if (slot + 1 == 2 * range.end || table[slot + 1] != table[slot])
          exact.push_back({folded * value[slot], folded * slope[slot]});
    exact.resize(parted.size() + 1, {0, 0});
    lines.reserve(exact.size());
    for (const Line<double>& line : exact) lines.push_back({static_cast<T>(line.value), static_cast<T>(line.slope)});
    if constexpr (std::is_same_v<T, float>) build_cells(kLineTolerance * std::fabs(folded) * largest_positive, elements);
  }

  // The gradient at s by the line of a bin; `first` is the number of the bin below all edges of the segment.
  double at(int32_t bin, int32_t first, double s) const {
    return bin > first ? exact[bin].value + exact[bin].slope * (s - static_cast<double>(parted.edges[bin - 1])) : 0;
  }

  void build_cells(double tolerance, int64_t elements) {
    // Few positives in a segment make steep changes of the slope, which a chord does not fit: narrower cells then.
    grid = make_grid(parted, parted.num_ranked() > 1 ? 24 : 8, elements);
    const int64_t part_cells = num_cells(grid), num_parts = static_cast<int64_t>(parted.parts.size());
    cells.reset(new CellLine[num_parts * part_cells]);
    for_cell_ranges(num_parts * part_cells, [&](int64_t from, int64_t to) {
      for_cells(
          grid, parted, from, to,
          [&](int64_t part, int32_t begin, int32_t end, int32_t before) {
            const int32_t first = parted.parts[part].first;
            RSL_ISA_CALL(fill_line_cells, &cells[part * part_cells + begin], int64_t{end - begin},
                         at(before, first, start_of_cell(grid, begin)), before > first ? exact[before].slope * grid.width : 0);
          },
          [&](int64_t part, int32_t cell, int32_t begin, int32_t end) {
            CellLine& line = cells[part * part_cells + cell];
            if (!fit_line(line, cell, parted.parts[part].first, begin, end, tolerance)) {
              line.value = std::numeric_limits<float>::quiet_NaN();
              std::memcpy(&line.slope, &begin, sizeof begin);
            }
          });
    });
  }

  // The chord over the cell, if it is good enough at both sides of every breakpoint inside.
  bool fit_line(CellLine& line, int32_t cell, int32_t lowest, int32_t begin, int32_t end, double tolerance) const {
    if ((cell == 0 && grid.cuts_low) || (cell + 1 == num_cells(grid) && grid.cuts_high)) return false;
    const double left = start_of_cell(grid, cell);
    const double first = at(begin, lowest, left), step = at(end, lowest, left + grid.width) - first;
    for (int32_t edge = begin; edge < end; ++edge) {
      const double s = parted.edges[edge], chord = first + step * (s - left) * static_cast<double>(grid.scale);
      const double below = std::fabs(at(edge, lowest, s) - chord), above = std::fabs(at(edge + 1, lowest, s) - chord);
      if (!(below <= tolerance && above <= tolerance)) return false;
    }
    line = {static_cast<float>(first), static_cast<float>(step)};
    return true;
  }

  GradientPass<T> pass() const {
    return {parted.edges.data(), parted.parts.data(), lines.data(), parted.lowest(0), grid, cells.get(), num_cells(grid)};
  }

  double factor;
  PartedEdges<T> parted;
  std::vector<Line<double>> exact;  // by bin
  std::vector<Line<T>> lines;       // the same in T
  CellGrid grid{};
  std::unique_ptr<CellLine[]> cells;  // [parts, cells of the grid]
};

// The gradients of the positives. Records come sorted by logit, so their flat indices are in any order.
struct PositiveGradients {
  const double* records;
  int64_t capacity;
  double first;   // upstream gradient of the first loss
  double second;  // and of the second one

  // Those of the elements [begin, end) of a tensor in which the first one has number `offset`. Who wrote the others there
  // writes these too, as long as the cache lines are at hand.
  template <class In>
  void write(int64_t offset, int64_t begin, int64_t end, In* gradient) const {
    const double from = static_cast<double>(offset + begin), to = static_cast<double>(offset + end);
    for (int64_t slot = 0; slot < capacity; ++slot) {
      const double index = records[kGradientIndex * capacity + slot];
      if (!(index >= from && index < to)) continue;
      const double value = first * records[kFirst * capacity + slot] + second * records[kSecond * capacity + slot];
      gradient[static_cast<int64_t>(index) - offset] = In(static_cast<Arithmetic<In>>(value));
    }
  }
};

template <class In>
void fill_nan(const Tensor& tensor) {
  In* data = static_cast<In*>(tensor.mutable_data_ptr());
  std::fill(data, data + tensor.numel(), In(static_cast<Arithmetic<In>>(kNaN)));
}

template <class In>
void stream_gradient(const Tensors& logits, const uint64_t* words, const SegmentMap& segments,
                     const GradientTables<Arithmetic<In>>& tables, const PositiveGradients& positives,
                     const Tensors& gradients) {
  using T = Arithmetic<In>;
  int64_t offset = 0;
  const GradientPass<T> pass = tables.pass();
  const PartLookup<T> lookup(segments, tables.parted, num_cells(tables.grid));
  for (size_t level = 0; level < logits.size(); ++level) {
    const In* data = static_cast<const In*>(logits[level].const_data_ptr());
    In* gradient = static_cast<In*>(gradients[level].mutable_data_ptr());
    const int64_t count = logits[level].numel(), level_words = mask_words(count);
    const int64_t tasks = task_count(level_words, kWordsPerTask);
    const auto write = [&](int64_t begin, int64_t end, const MixedSpan* span, const GradientPass<T>& of_part) {
      RSL_ISA_CALL(write_gradient, data + begin * 64, std::min(end * 64, count) - begin * 64, words + begin, span, of_part,
                   gradient + begin * 64);
    };
    run_tasks(tasks, [&](int64_t task) {
      const int64_t first = task_begin(level_words, tasks, task), last = task_begin(level_words, tasks, task + 1);
      segments.for_spans(
          level, first, last,
          [&](int64_t segment, int64_t begin, int64_t end) {
            write(begin, end, nullptr, pass_of_part(pass, tables.parted.part(segment)));
          },
          [&](int64_t begin, int64_t end) {
            const MixedSpan span = lookup.span(level, begin * 64);
            write(begin, end, &span, pass);
          });
      positives.write(offset, first * 64, std::min(last * 64, count), gradient);
    });
    words += level_words;
    offset += count;
  }
}

// Multiplies the gradient of every negative.
template <class In>
void scale_negatives(const uint64_t* words, double factor, const Tensors& gradients) {
  using T = Arithmetic<In>;
  for (const Tensor& level : gradients) {
    In* gradient = static_cast<In*>(level.mutable_data_ptr());
    for (int64_t i = 0; i < level.numel(); ++i)
      if (words[i / 64] >> i % 64 & 1) gradient[i] = In(static_cast<T>(static_cast<double>(widen(gradient[i])) * factor));
    words += mask_words(level.numel());
  }
}

// The largest gradient of a positive for an upstream gradient of 1 of the first loss, `ratio` of the second.
double largest_gradient(const double* records, int64_t capacity, double ratio) {
  double largest = 0;
  for (int64_t slot = 0; slot < capacity; ++slot)
    largest = std::fmax(largest, std::fabs(records[kFirst * capacity + slot] + ratio * records[kSecond * capacity + slot]));
  return largest;
}

// The grid, the look-ups and the patterns are of breakpoints that ascend from a finite one, as finalize writes them.
template <class T>
void check_breakpoints(const char* op, const double* breakpoints, const std::vector<SegmentRange>& ranges) {
  for (const SegmentRange& range : ranges) {
    bool ascends = std::fabs(breakpoints[2 * range.begin]) <= std::numeric_limits<T>::max();
    for (int64_t slot = 2 * range.begin + 1; slot < 2 * range.end; ++slot)
      ascends = ascends && breakpoints[slot] >= breakpoints[slot - 1];
    STD_TORCH_CHECK(ascends, op,
                    ": lines must hold breakpoints that ascend in every segment, as a finalize writes them, "
                    "got others in segment ",
                    range.segment);
  }
}

Tensors ranking_backward(Tensors logits, Tensor negatives, Tensor gradients, Tensor lines, Tensor counts,
                         std::optional<Tensor> segments, int64_t num_segments, std::optional<Tensor> grad_first,
                         std::optional<Tensor> grad_second) {
  const char* op = "ranking_backward";
  const int64_t capacity =
      check_collected(op, logits, negatives, counts, segments, num_segments, "gradients", gradients, kGradientRows);
  check_table(op, "lines", lines, logits[0], ScalarType::Double, kLineRows, 2 * capacity);
  const double first = upstream_value(op, "grad_first", grad_first), second = upstream_value(op, "grad_second", grad_second);
  const bool overflowed = static_cast<const int64_t*>(counts.const_data_ptr())[kFound] > capacity;
  Tensors results;
  for (const Tensor& level : logits) results.push_back(new_cpu_tensor_like(level));
  dispatch_floating(logits[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    if (overflowed) {
      for (const Tensor& result : results) fill_nan<In>(result);
      return;
    }
    const double* records = static_cast<const double*>(gradients.const_data_ptr());
    const uint64_t* words = static_cast<const uint64_t*>(negatives.const_data_ptr());
    const PositiveGradients positives{records, capacity, first, second};
    const double ratio = first != 0 && std::isfinite(second / first) ? second / first : 0;
    using T = Arithmetic<In>;
    const double* table = static_cast<const double*>(lines.const_data_ptr());
    const SegmentMap map(logits, segments, num_segments);
    const std::vector<SegmentRange> ranges = segment_ranges(records + kGradientSegment * capacity, capacity, num_segments);
    check_breakpoints<T>(op, table, ranges);
    const int64_t elements = static_cast<const int64_t*>(counts.const_data_ptr())[kElements];
    if constexpr (sizeof(In) == 2) {
      if (takes_patterns(map, elements)) {
        const auto by_pattern = pattern_gradients<In>(table, 2 * capacity, 2 * count_ranks(ranges), first);
        write_pattern_gradients<In>(logits, words, by_pattern.get(), positives, results);
        return;
      }
    }
    const GradientTables<T> tables(table, 2 * capacity, ranges, PartedEdges<T>(table, ranges, num_segments, map.has_ids()),
                                   first, largest_gradient(records, capacity, ratio), elements);
    stream_gradient<In>(logits, words, map, tables, positives, results);
    if (tables.factor != 1) scale_negatives<In>(words, tables.factor, results);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) { m.impl("ranking_backward.cpp", TORCH_BOX(&ranking_backward)); }

}  // namespace rsloss
