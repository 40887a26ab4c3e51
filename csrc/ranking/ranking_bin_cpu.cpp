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
#include "ranking/ranking.h"
#include "ranking/ranking_checks.h"
#include "ranking/ranking_sweep.h"
#include "ranking/windows_cpu.h"

#define RSL_SIMD_BODY "ranking/ranking_bin_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

// Ascending by (logit, quality, flat index), NaN logits last, padding at the very end. Records come in flat order.
void sort_records(const double* records, double* ranked, int64_t capacity) {
  const double* quality = records + kQuality * capacity;
  const double* index = records + kIndex * capacity;
  std::vector<SortKey> keys;
  keys.reserve(capacity);
  for (int64_t slot = 0; slot < capacity; ++slot)
    if (!std::isnan(records[slot])) keys.push_back({ordered_bits(records[slot]), static_cast<int32_t>(slot)});
  sort_keys(keys);
  // Records come in flat order, except behind an all-gather; ties of the logit go by quality, then by flat index.
  for (auto begin = keys.begin(); begin != keys.end();) {
    const auto end = std::find_if(begin, keys.end(), [&](const SortKey& key) { return key.bits != begin->bits; });
    std::sort(begin, end, [&](const SortKey& a, const SortKey& b) {
      return quality[a.slot] != quality[b.slot] ? quality[a.slot] < quality[b.slot] : index[a.slot] < index[b.slot];
    });
    begin = end;
  }
  for (const bool padding : {false, true})
    for (int64_t slot = 0; slot < capacity; ++slot)
      if (std::isnan(records[slot]) && (index[slot] < 0) == padding) keys.push_back({0, static_cast<int32_t>(slot)});
  for (int row = 0; row < kRecordRows; ++row)
    for (int64_t slot = 0; slot < capacity; ++slot) ranked[row * capacity + slot] = records[row * capacity + keys[slot].slot];
}

// Everything a binning pass reads, and per task the sums that it writes.
template <class T>
struct BinTables {
  BinTables(const Breakpoints& points, double unit, double most, int64_t elements)
      : edges(distinct_edges<T>(points.edges.data(), static_cast<int64_t>(points.edges.size()))),
        near{unit > 0 ? 1 / unit : 0, most} {
    if constexpr (std::is_same_v<T, float>) build_cells(unit, elements);
  }

  void build_cells(double unit, int64_t elements) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    grid = make_grid(edges, 16, elements);
    cells.reset(new BinCell[num_cells(grid)]);
    for_cell_ranges(grid, [&](int32_t from, int32_t to) {
      for_cells(
          grid, edges, from, to,
          [&](int32_t begin, int32_t end, int32_t before) {
            std::fill(&cells[begin], &cells[end], BinCell{nan, static_cast<uint32_t>(before)});
          },
          [&](int32_t cell, int32_t begin, int32_t end) {
            const bool is_crowded =
                end - begin > 1 || (cell == 0 && grid.cuts_low) || (cell + 1 == num_cells(grid) && grid.cuts_high);
            cells[cell] = is_crowded ? BinCell{nan, kCrowded | static_cast<uint32_t>(begin)}
                                     : BinCell{edges[begin], static_cast<uint32_t>(begin)};
          });
    });
    origin = start_of_cell(grid, 0);
    // Offsets span the whole grid in as many bits as near offsets span a window; never in finer units than those.
    const double range = std::exp2(std::ceil(std::log2(num_cells(grid) * grid.width)));
    const double far_unit = std::max(unit, range / (near.most + 1));
    far = {unit > 0 ? 1 / far_unit : 0, near.most};
    far_steps = unit > 0 ? static_cast<int64_t>(std::log2(far_unit / unit)) : 0;
  }

  BinPass<T> pass(BinSums* sums) const {
    const int32_t count = static_cast<int32_t>(edges.size());
    if constexpr (std::is_same_v<T, float>)
      return {edges.data(), count, grid, cells.get(), origin, far, origin * far.scale, near, sums, sums + count + 1};
    else return {edges.data(), count, near, sums + count + 1};
  }

  // Sums of one task: [2, edges + 1], far offsets before near ones.
  int64_t num_sums() const { return 2 * (static_cast<int64_t>(edges.size()) + 1); }

  // The sum of the offsets from the left breakpoint of bin `bin` > 0, which a window covers, in near units, of all its
  // elements. The breakpoint may lie below the grid. Terms may wrap around, the sum cannot.
  int64_t near_sum(const BinSums* sums, int64_t bin) const {
    const BinSums& distant = sums[bin];
    const int64_t searched = sums[edges.size() + 1 + bin].sum;
    if (distant.count == 0) return searched;
    const auto left = static_cast<int64_t>(std::floor((static_cast<double>(edges[bin - 1]) - origin) * far.scale));
    const uint64_t sum =
        static_cast<uint64_t>(distant.sum) - static_cast<uint64_t>(distant.count) * static_cast<uint64_t>(left);
    return static_cast<int64_t>(sum << far_steps) + searched;
  }

  std::vector<T> edges;
  OffsetScale near, far{};
  CellGrid grid{};
  std::unique_ptr<BinCell[]> cells;
  double origin = 0;
  int64_t far_steps = 0;  // log2 of the far unit over the near one
};

// Writes counts and near sums to the bins of the slots; sums of bins outside every window stay 0, they may not fit.
template <class T>
void write_bins(const BinTables<T>& tables, const BinSums* sums, const Breakpoints& points, int64_t* counts, int64_t* offsets) {
  const int64_t slots = static_cast<int64_t>(points.edges.size());
  const int64_t num_bins = tables.num_sums() / 2;
  int64_t bin = 0, opened = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    while (opened < slots / 2 && points.lo_slot[opened] <= slot) ++opened;
    if (slot == 0 || points.edges[slot] != points.edges[slot - 1]) ++bin;
    if (slot + 1 < slots && points.edges[slot + 1] == points.edges[slot]) continue;
    counts[slot + 1] = sums[bin].count + sums[num_bins + bin].count;
    const bool is_covered = 2 * opened > slot + 1;
    if (is_covered && tables.near.scale > 0) offsets[slot + 1] = tables.near_sum(sums, bin);
  }
}

// Streams the negatives of all tensors; returns the number of NaN among them.
template <class In>
int64_t stream_negatives(const Tensors& logits, const uint64_t* words, const Breakpoints& points, double unit, double most,
                         int64_t* counts, int64_t* offsets) {
  const int64_t elements = count_elements(logits);
  const BinTables<Arithmetic<In>> tables(points, unit, most, elements);
  const int64_t num_sums = tables.num_sums();
  // Every further thread costs a table and its clearing.
  const int64_t worthwhile = std::max<int64_t>(2, elements / (4 * num_sums));
  const int64_t tasks = limit_by_memory(std::min(task_count(mask_words(elements), kWordsPerTask), worthwhile),
                                        num_sums * static_cast<int64_t>(sizeof(BinSums)));
  std::vector<BinSums> sums(static_cast<size_t>(tasks * num_sums));
  std::vector<int64_t> nan_counts(tasks, 0);
  for (const Tensor& level : logits) {
    const In* data = static_cast<const In*>(level.const_data_ptr());
    const int64_t count = level.numel(), level_words = mask_words(count);
    run_tasks(tasks, [&](int64_t task) {
      const int64_t begin = task_begin(level_words, tasks, task), end = task_begin(level_words, tasks, task + 1);
      if (begin == end) return;
      const auto pass = tables.pass(sums.data() + task * num_sums);
      nan_counts[task] +=
          RSL_ISA_CALL(bin_negatives, data + begin * 64, std::min(end * 64, count) - begin * 64, words + begin, pass);
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
  write_bins(tables, sums.data(), points, counts, offsets);
  return nan_counts[0];
}

std::tuple<Tensor, Tensor> ranking_bin(Tensors logits, Tensor negatives, Tensor positives, Tensor counts,
                                       std::optional<Tensor> segments, int64_t num_segments, double delta) {
  const char* op = "ranking_bin";
  check_delta(op, delta);
  const int64_t capacity =
      check_collected(op, logits, negatives, counts, segments, num_segments, "positives", positives, kRecordRows);
  const int64_t columns = 2 * capacity + 1;
  Tensor ranked = new_cpu_tensor({kRecordRows, capacity}, ScalarType::Double);
  Tensor bins = new_cpu_tensor({2, columns}, ScalarType::Long);
  double* sorted = static_cast<double*>(ranked.mutable_data_ptr());
  sort_records(static_cast<const double*>(positives.const_data_ptr()), sorted, capacity);
  const int64_t valid = count_valid(sorted, capacity);
  int64_t* bin_counts = static_cast<int64_t*>(bins.mutable_data_ptr());
  std::memset(bin_counts, 0, static_cast<size_t>(2 * columns) * sizeof(int64_t));
  const int64_t elements = static_cast<const int64_t*>(counts.const_data_ptr())[kElements];
  const int bits = fixed_point_bits(elements);
  const double unit = fixed_point_unit(delta, bits), most = static_cast<double>((int64_t{1} << bits) - 1);
  dispatch_floating(logits[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    const Breakpoints points =
        merge_breakpoints<Arithmetic<In>>(sorted, segment_ranges(sorted + kSegment * capacity, valid, num_segments), delta);
    bin_counts[0] = stream_negatives<In>(logits, static_cast<const uint64_t*>(negatives.const_data_ptr()), points, unit, most,
                                         bin_counts, bin_counts + columns);
  });
  return {ranked, bins};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) { m.impl("ranking_bin.cpp", TORCH_BOX(&ranking_bin)); }

}  // namespace rsloss
