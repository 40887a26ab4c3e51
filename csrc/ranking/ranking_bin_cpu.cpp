// Ranks the positives and bins the negatives on the CPU: one threaded pass over the logits. Per thread 64 bytes of sums per
// breakpoint, combined as integers, so that the result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "common/sort_doubles.h"
#include "ranking/patterns_cpu.h"
#include "ranking/ranking.h"
#include "ranking/ranking_checks.h"
#include "ranking/ranking_forward_cpu.h"
#include "ranking/ranking_sweep.h"
#include "ranking/windows_cpu.h"

#define RSL_SIMD_BODY "ranking/ranking_bin_simd.h"
#include "common/for_each_isa.h"

#define RSL_SIMD_BODY "ranking/pattern_counts_simd.h"
#include "common/for_each_isa.h"

#include "ranking/pattern_counts_cpu.h"

namespace rsloss {
namespace {

static_assert(kMostPositives <= int64_t{1} << kSlotBits);

// Reorders the keys by segment, stably. A segment that there is not counts as the first or the last one.
void group_by_segment(std::vector<SortKey>& keys, const double* segment, int64_t num_segments) {
  const auto bounded = [=](const SortKey& key) {
    return static_cast<int64_t>(std::fmin(std::fmax(segment[key.slot], 0), static_cast<double>(num_segments - 1)));
  };
  std::vector<int64_t> next(num_segments + 1, 0);
  for (const SortKey& key : keys) ++next[bounded(key) + 1];
  for (int64_t s = 0; s < num_segments; ++s) next[s + 1] += next[s];
  std::vector<SortKey> grouped(keys.size());
  for (const SortKey& key : keys) grouped[next[bounded(key)]++] = key;
  keys.swap(grouped);
}

// Ascending by (segment, logit, quality, flat index), NaN logits last, padding at the very end.
void sort_records(const double* records, double* ranked, int64_t capacity, int64_t num_segments) {
  const double* quality = records + kQuality * capacity;
  const double* segment = records + kSegment * capacity;
  const double* index = records + kIndex * capacity;
  std::vector<SortKey> keys;
  keys.reserve(capacity);
  for (int64_t slot = 0; slot < capacity; ++slot)
    if (!std::isnan(records[slot])) keys.push_back({ordered_bits(records[slot]), static_cast<int32_t>(slot)});
  sort_keys(keys);
  if (num_segments > 1) group_by_segment(keys, records + kSegment * capacity, num_segments);
  // Records come in flat order, except behind an all-gather; ties of the logit go by quality, then by flat index.
  for (auto begin = keys.begin(); begin != keys.end();) {
    auto end = begin + 1;
    while (end != keys.end() && end->bits == begin->bits && segment[end->slot] == segment[begin->slot]) ++end;
    if (end - begin > 1) {
      std::sort(begin, end, [&](const SortKey& a, const SortKey& b) {
        return quality[a.slot] != quality[b.slot] ? quality[a.slot] < quality[b.slot] : index[a.slot] < index[b.slot];
      });
    }
    begin = end;
  }
  if (static_cast<int64_t>(keys.size()) < capacity) {
    for (const bool padding : {false, true})
      for (int64_t slot = 0; slot < capacity; ++slot)
        if (std::isnan(records[slot]) && (index[slot] < 0) == padding) keys.push_back({0, static_cast<int32_t>(slot)});
  }
  for (int row = 0; row < kRecordRows; ++row)
    for (int64_t slot = 0; slot < capacity; ++slot) ranked[row * capacity + slot] = records[row * capacity + keys[slot].slot];
}

// Everything a binning pass reads, and per task the sums that it writes.
template <class T>
struct BinTables {
  BinTables(PartedEdges<T> breakpoints, double unit, double most, int64_t elements)
      : parted(std::move(breakpoints)), near{unit > 0 ? 1 / unit : 0, most} {
    if constexpr (std::is_same_v<T, float>) build_cells(unit, elements);
  }

  void build_cells(double unit, int64_t elements) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    grid = make_grid(parted, 16, elements);
    const int64_t part_cells = num_cells(grid), num_parts = static_cast<int64_t>(parted.parts.size());
    origin = start_of_cell(grid, 0);
    // Offsets span the whole grid in as many bits as near offsets span a window, or as a packed word has for one; never in
    // finer units than those, nor in such that `shift` would not be exact.
    const double steps = is_packed() ? std::exp2(kPackedOffsetBits) : near.most + 1;
    const auto power_above = [](double value) { return value > 0 ? std::exp2(std::ceil(std::log2(value))) : 0; };
    const double range = power_above(num_cells(grid) * grid.width);
    const double far_unit = std::max({unit, range / steps, 0x1p-50 * power_above(std::fabs(origin))});
    far_scale = unit > 0 ? 1 / far_unit : 0;
    far_steps = unit > 0 ? static_cast<int64_t>(std::log2(far_unit / unit)) : 0;
    // Around 0 floats are finer than far units, and the least share of a window may be all that a loss consists of: the
    // elements there are searched for.
    int32_t blurred_begin = 0, blurred_end = 0;
    const float reach = static_cast<float>(std::min(0x1p24 * far_unit, 0x1p127));
    if (far_steps > 0 && origin <= reach && grid.top >= -reach) {
      blurred_begin = cell_of(grid, -reach);
      blurred_end = cell_of(grid, reach) + 1;
    }
    cells.reset(new BinCell[num_parts * part_cells]);
    for_cell_ranges(num_parts * part_cells, [&](int64_t from, int64_t to) {
      for_cells(
          grid, parted, from, to,
          [&](int64_t part, int32_t begin, int32_t end, int32_t before) {
            BinCell* table = &cells[part * part_cells];
            std::fill(table + begin, table + end, BinCell{nan, static_cast<uint32_t>(before)});
            for (int32_t cell = std::max(begin, blurred_begin); cell < std::min(end, blurred_end); ++cell)
              table[cell] = crowded_cell(before, 0, true);
          },
          [&](int64_t part, int32_t cell, int32_t begin, int32_t end) {
            const bool is_blurred = (cell == 0 && grid.cuts_low) || (cell + 1 == part_cells && grid.cuts_high) ||
                                    (cell >= blurred_begin && cell < blurred_end);
            cells[part * part_cells + cell] = is_blurred || end - begin > 1
                                                  ? crowded_cell(begin, end - begin, is_blurred)
                                                  : BinCell{parted.edges[begin], static_cast<uint32_t>(begin)};
          });
    });
  }

  // packed: none if is_packed() is false.
  BinPass<T> pass(BinSums* sums, PackedSums* packed) const {
    BinSums* searched = sums + num_sums() / 2;
    if constexpr (std::is_same_v<T, float>)
      return {parted.edges.data(),
              parted.parts.data(),
              cells.get(),
              num_cells(grid),
              parted.lowest(0),
              grid,
              far_scale,
              kIntegerShift - origin * far_scale,
              packed,
              near,
              sums,
              searched};
    else return {parted.edges.data(), parted.parts.data(), near, searched};
  }

  int64_t part_cells() const { return num_cells(grid); }

  bool is_packed() const { return std::is_same_v<T, float> && parted.size() < kMostPackedBins; }

  // Sums of one task: [2, edges + 1], far offsets before near ones.
  int64_t num_sums() const { return 2 * (int64_t{parted.size()} + 1); }

  // The sum of the offsets from the left breakpoint of bin `bin` > 0, which a window covers, in near units, of all its
  // elements. The breakpoint may lie below the grid, and between two far units. Terms may wrap around, the sum cannot.
  int64_t near_sum(const BinSums* sums, int64_t bin) const {
    const BinSums& distant = sums[bin];
    const int64_t searched = sums[num_sums() / 2 + bin].sum;
    // Far units that much coarser: all these elements lie at the breakpoint, their sum is 0.
    if (distant.count == 0 || far_scale == 0 || far_steps > 62) return searched;
    const double left = (static_cast<double>(parted.edges[bin - 1]) - origin) * far_scale, whole = std::floor(left);
    const auto rest = static_cast<uint64_t>((left - whole) * static_cast<double>(int64_t{1} << far_steps));
    const uint64_t count = static_cast<uint64_t>(distant.count);
    const uint64_t far_sum = static_cast<uint64_t>(distant.sum) - count * static_cast<uint64_t>(static_cast<int64_t>(whole));
    return static_cast<int64_t>((far_sum << far_steps) - count * rest) + searched;
  }

  PartedEdges<T> parted;
  OffsetScale near;
  CellGrid grid{};
  std::unique_ptr<BinCell[]> cells;
  double origin = 0;
  double far_scale = 0;   // 1 / far unit; 0 for delta = 0
  int64_t far_steps = 0;  // log2 of the far unit over the near one
};

// Writes counts and near sums to the bins of the slots; sums of bins outside every window stay 0, they may not fit.
// count_of(bin), sum_of(bin): of the bins by distinct breakpoints.
template <class Count, class Sum>
void write_bins(const Breakpoints& points, const std::vector<SegmentRange>& ranges, const Count& count_of, const Sum& sum_of,
                int64_t* counts, int64_t* offsets) {
  int64_t bin = 0;
  for (const SegmentRange& range : ranges) {
    const int64_t first = 2 * range.begin, last = 2 * range.end;
    int64_t opened = range.begin;
    for (int64_t slot = first; slot < last; ++slot) {
      while (opened < range.end && points.lo_slot[opened] <= slot) ++opened;
      if (slot == first || points.edges[slot] != points.edges[slot - 1]) ++bin;
      if (slot + 1 < last && points.edges[slot + 1] == points.edges[slot]) continue;
      counts[slot + 1] = count_of(bin);
      const bool is_covered = 2 * (opened - range.begin) > slot + 1 - first;
      if (is_covered) offsets[slot + 1] = sum_of(bin);
    }
  }
}

// The same negatives by their bit patterns; returns the number of NaN among them.
template <class In>
int64_t bin_patterns(const Histogram& counted, const std::vector<SegmentRange>& ranges, const Breakpoints& points,
                     OffsetScale scale, int64_t* counts, int64_t* offsets) {
  const PartedEdges<float> parted(points.edges.data(), ranges, 1, false);
  std::vector<BinSums> sums(parted.edges.size() + 1);
  const int64_t nan_count = bin_histogram<In>(counted, parted.edges, scale, sums.data());
  write_bins(
      points, ranges, [&](int64_t bin) { return sums[bin].count; }, [&](int64_t bin) { return sums[bin].sum; }, counts,
      offsets);
  return nan_count;
}

// Streams the negatives of all tensors; returns the number of NaN among them.
template <class In>
int64_t stream_negatives(const Tensors& logits, const uint64_t* words, const SegmentMap& segments,
                         const std::vector<SegmentRange>& ranges, const Breakpoints& points, double unit, double most,
                         int64_t elements, int64_t* counts, int64_t* offsets) {
  using T = Arithmetic<In>;
  const BinTables<T> tables(PartedEdges<T>(points.edges.data(), ranges, segments.num_segments(), segments.has_ids()), unit,
                            most, elements);
  const PartLookup<T> lookup(segments, tables.parted, tables.part_cells());
  const int64_t num_sums = tables.num_sums();
  // Every further thread costs a table and its clearing.
  const int64_t local_elements = count_elements(logits);
  const int64_t worthwhile = std::max<int64_t>(2, local_elements / (4 * num_sums));
  const int64_t tasks = limit_by_memory(std::min(task_count(mask_words(local_elements), kWordsPerTask), worthwhile),
                                        num_sums * static_cast<int64_t>(sizeof(BinSums)));
  const std::unique_ptr<BinSums[]> sums(new BinSums[tasks * num_sums]);
  const int64_t num_words = tables.is_packed() ? num_sums / 2 : 0;
  const std::unique_ptr<uint64_t[]> words_of_tasks(new uint64_t[tasks * num_words]);
  std::vector<int64_t> nan_counts(tasks, 0);
  for (size_t level = 0; level < logits.size(); ++level) {
    const In* data = static_cast<const In*>(logits[level].const_data_ptr());
    const int64_t count = logits[level].numel(), level_words = mask_words(count);
    run_tasks(tasks, [&](int64_t task) {
      BinSums* mine = &sums[task * num_sums];
      if (level == 0) std::memset(mine, 0, static_cast<size_t>(num_sums) * sizeof(BinSums));
      PackedSums packed{&words_of_tasks[task * num_words], static_cast<int32_t>(num_words), 0};
      std::fill_n(packed.words, num_words, 0);
      const BinPass<T> pass = tables.pass(mine, num_words > 0 ? &packed : nullptr);
      int64_t nan_count = 0;
      const auto bin = [&](int64_t begin, int64_t end, const MixedSpan* span, const BinPass<T>& of_part) {
        nan_count += RSL_ISA_CALL(bin_negatives, data + begin * 64, std::min(end * 64, count) - begin * 64, words + begin, span,
                                  of_part);
      };
      segments.for_spans(
          level, task_begin(level_words, tasks, task), task_begin(level_words, tasks, task + 1),
          [&](int64_t segment, int64_t begin, int64_t end) {
            bin(begin, end, nullptr, pass_of_part(pass, tables.parted.part(segment)));
          },
          [&](int64_t begin, int64_t end) {
            const MixedSpan span = lookup.span(level, begin * 64);
            bin(begin, end, &span, pass);
          });
      if constexpr (std::is_same_v<T, float>)
        if (num_words > 0) RSL_ISA_CALL(empty_packed, pass);
      nan_counts[task] += nan_count;
    });
    words += level_words;
  }
  for (int64_t task = 1; task < tasks; ++task) {
    nan_counts[0] += nan_counts[task];
    for (int64_t i = 0; i < num_sums; ++i) {
      sums[i].count += sums[task * num_sums + i].count;
      sums[i].sum += sums[task * num_sums + i].sum;
    }
  }
  write_bins(
      points, ranges, [&](int64_t bin) { return sums[bin].count + sums[num_sums / 2 + bin].count; },
      [&](int64_t bin) { return tables.near_sum(sums.get(), bin); }, counts, offsets);
  return nan_counts[0];
}

}  // namespace

std::tuple<Tensor, Tensor> rank_and_bin(const Tensors& logits, const Tensor& negatives, const Tensor& positives,
                                        const Tensor& counts, const std::optional<Tensor>& segments, int64_t num_segments,
                                        double delta, std::optional<Windows>& windows) {
  const char* op = "ranking_bin";
  check_delta(op, delta);
  const int64_t capacity =
      check_collected(op, logits, negatives, counts, segments, num_segments, "positives", positives, kRecordRows);
  const int64_t columns = 2 * capacity + 1;
  Tensor ranked = new_cpu_tensor({kRecordRows, capacity}, ScalarType::Double);
  Tensor bins = new_cpu_tensor({2, columns}, ScalarType::Long);
  const bool is_double = logits[0].scalar_type() == ScalarType::Double;
  const auto rank = [&] {
    double* sorted = static_cast<double*>(ranked.mutable_data_ptr());
    sort_records(static_cast<const double*>(positives.const_data_ptr()), sorted, capacity, num_segments);
    windows = windows_of(sorted, capacity, num_segments, delta, is_double);
  };
  const uint64_t* words = static_cast<const uint64_t*>(negatives.const_data_ptr());
  const int64_t elements = static_cast<const int64_t*>(counts.const_data_ptr())[kElements];
  const SegmentMap map(logits, segments, num_segments);
  std::optional<Histogram> counted;
  if (logits[0].element_size() == 2 && takes_patterns(map, elements)) {
    const int64_t tasks = std::min(kMostTasks, task_count(mask_words(count_elements(logits)), kWordsPerTask));
    counted.emplace(tasks);
    // Counting needs no positives: they are ranked beside it.
    count_negatives(logits, words, tasks, *counted, rank);
  } else {
    rank();
  }
  const Breakpoints& points = windows->breakpoints;
  const std::vector<SegmentRange>& ranges = windows->ranges;
  int64_t* bin_counts = static_cast<int64_t*>(bins.mutable_data_ptr());
  std::memset(bin_counts, 0, static_cast<size_t>(2 * columns) * sizeof(int64_t));
  const int bits = fixed_point_bits(elements, is_double);
  const double unit = fixed_point_unit(delta, bits), most = static_cast<double>((int64_t{1} << bits) - 1);
  dispatch_floating(logits[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    if constexpr (sizeof(In) == 2) {
      if (counted) {
        bin_counts[0] =
            bin_patterns<In>(*counted, ranges, points, {unit > 0 ? 1 / unit : 0, most}, bin_counts, bin_counts + columns);
        return;
      }
    }
    bin_counts[0] =
        stream_negatives<In>(logits, words, map, ranges, points, unit, most, elements, bin_counts, bin_counts + columns);
  });
  return {ranked, bins};
}

std::tuple<Tensor, Tensor> ranking_bin(Tensors logits, Tensor negatives, Tensor positives, Tensor counts,
                                       std::optional<Tensor> segments, int64_t num_segments, double delta) {
  std::optional<Windows> windows;
  return rank_and_bin(logits, negatives, positives, counts, segments, num_segments, delta, windows);
}

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) { m.impl("ranking_bin.cpp", TORCH_BOX(&ranking_bin)); }

}  // namespace rsloss
