// The shared ranking operators on the CPU: collect the positives, bin the negatives, write the gradient.
// Two streaming passes over the logits, threaded; per thread 32 bytes of sums per breakpoint, combined as integers, so that the result does
// not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/sort_doubles.h"
#include "ranking/cell_grid.h"
#include "ranking/ranking.h"
#include "ranking/ranking_sweep.h"
#include "ranking/windows_cpu.h"

namespace rsloss {
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;
}  // namespace rsloss

#define RSL_SIMD_BODY "ranking/ranking_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kWordsPerTask = 256;   // 16,384 elements: enough to pay for waking a thread
constexpr int64_t kScanWords = 512;

template <class In>
using Arithmetic = std::conditional_t<std::is_same_v<In, double>, double, float>;

// Calls body with a value of the C++ type of a floating dtype.
template <class Body>
void dispatch_floating(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Double: return body(double{});
    case ScalarType::Half: return body(Half{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: return body(float{});
  }
}

double element(const Tensor& tensor, int64_t i) {
  double value = 0;
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    value = static_cast<double>(static_cast<const decltype(tag)*>(tensor.const_data_ptr())[i]);
  });
  return value;
}

// out[i] = tensor[index[i] / divisor], as double.
void gather_elements(const Tensor& tensor, const std::vector<int64_t>& index, int64_t divisor, int64_t count, double* out) {
  dispatch_floating(tensor.scalar_type(), [&](auto tag) {
    const auto* data = static_cast<const decltype(tag)*>(tensor.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<double>(data[divisor == 1 ? index[i] : index[i] / divisor]);
  });
}

uint64_t* words_of(const Tensor& mask) { return static_cast<uint64_t*>(mask.mutable_data_ptr()); }

// ---- collect -----------------------------------------------------------------------------------------------------------------

// Fills the mask of one tensor from dense targets; returns the flat indices of the positives, ascending.
std::vector<int64_t> scan_dense(const Tensor& targets, uint64_t* negatives) {
  const int64_t count = targets.numel(), words = mask_words(count);
  const int64_t tasks = task_count(words, kWordsPerTask);
  std::vector<std::vector<int64_t>> found(tasks);
  dispatch_floating(targets.scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    const In* data = static_cast<const In*>(targets.const_data_ptr());
    run_tasks(tasks, [&](int64_t task) {
      uint64_t positives[kScanWords];
      const int64_t end = task_begin(words, tasks, task + 1);
      for (int64_t word = task_begin(words, tasks, task); word < end; word += kScanWords) {
        const int64_t block = std::min(kScanWords, end - word);
        RSL_ISA_CALL(scan_targets, data + word * 64, std::min(block * 64, count - word * 64), negatives + word, positives);
        for (int64_t i = 0; i < block; ++i)
          for (uint64_t bits = positives[i]; bits != 0; bits &= bits - 1)
            found[task].push_back((word + i) * 64 + __builtin_ctzll(bits));
      }
    });
  });
  for (int64_t task = 1; task < tasks; ++task) found[0].insert(found[0].end(), found[task].begin(), found[task].end());
  return std::move(found[0]);
}

void clear_bits(uint64_t* words, int64_t begin, int64_t end) {
  for (; begin < end && begin % 64 != 0; ++begin) words[begin / 64] &= ~(uint64_t{1} << begin % 64);
  for (; begin + 64 <= end; begin += 64) words[begin / 64] = 0;
  for (; begin < end; ++begin) words[begin / 64] &= ~(uint64_t{1} << begin % 64);
}

// The same from class indices. Tasks own multiples of 64 rows, so that no two touch the same word.
template <class Label>
std::vector<int64_t> scan_labels(const Label* labels, int64_t rows, int64_t classes, bool background_first, uint64_t* negatives) {
  const int64_t words = mask_words(rows * classes), groups = (rows + 63) / 64;
  std::memset(negatives, 0xff, words * 8);
  clear_bits(negatives, rows * classes, words * 64);
  const int64_t tasks = task_count(rows, 1 << 15);
  std::vector<std::vector<int64_t>> found(tasks);
  run_tasks(tasks, [&](int64_t task) {
    const int64_t end = std::min(rows, 64 * task_begin(groups, tasks, task + 1));
    for (int64_t row = 64 * task_begin(groups, tasks, task); row < end; ++row) {
      const int64_t label = static_cast<int64_t>(labels[row]);
      const int64_t column = background_first ? label - 1 : label;
      if (label < 0) {
        clear_bits(negatives, row * classes, (row + 1) * classes);
      } else if (column >= 0 && column < classes) {
        const int64_t index = row * classes + column;
        negatives[index / 64] &= ~(uint64_t{1} << index % 64);
        found[task].push_back(index);
      }
    }
  });
  for (int64_t task = 1; task < tasks; ++task) found[0].insert(found[0].end(), found[task].begin(), found[task].end());
  return std::move(found[0]);
}

bool is_index_form(const Tensor& targets) { return !is_floating(targets.scalar_type()); }

void check_targets(const Tensors& logits, const Tensors& targets, const Tensors& quality) {
  const char* op = "ranking_collect";
  check_logits(op, logits);
  STD_TORCH_CHECK(targets.size() == logits.size(), op, ": targets must hold as many tensors as logits, ", logits.size(), ", got ",
                  targets.size());
  STD_TORCH_CHECK(quality.empty() || quality.size() == logits.size(), op, ": quality must be empty or hold as many tensors as logits, ",
                  logits.size(), ", got ", quality.size());
  for (size_t level = 0; level < logits.size(); ++level) {
    check_placement(op, "targets", targets[level], logits[0]);
    const ScalarType type = targets[level].scalar_type();
    STD_TORCH_CHECK(is_floating(type) || type == ScalarType::Int || type == ScalarType::Long, op,
                    ": targets must be floating, int32 or int64");
    const bool index_form = is_index_form(targets[level]);
    const int64_t dims = logits[level].dim() - (index_form ? 1 : 0);
    bool matches = targets[level].dim() == dims;
    for (int64_t d = 0; matches && d < dims; ++d) matches = targets[level].size(d) == logits[level].size(d);
    STD_TORCH_CHECK(matches, op, ": targets must have the shape of logits, ", shape_of(logits[level]),
                    index_form ? ", less its last dimension" : "", ", got ", shape_of(targets[level]));
    if (quality.empty()) continue;
    check_placement(op, "quality", quality[level], logits[0]);
    STD_TORCH_CHECK(index_form, op, ": quality must be empty with dense targets");
    STD_TORCH_CHECK(is_floating(quality[level].scalar_type()), op, ": quality must have a floating dtype");
    STD_TORCH_CHECK(shape_of(quality[level]) == shape_of(targets[level]), op, ": quality must have the shape of targets, ",
                    shape_of(targets[level]), ", got ", shape_of(quality[level]));
  }
}

std::tuple<Tensor, Tensor, Tensor> ranking_collect(Tensors logits, Tensors targets, Tensors quality, std::optional<Tensor> segments,
                                                   int64_t num_segments, std::optional<int64_t> max_positives, bool background_first) {
  check_targets(logits, targets, quality);
  check_unsegmented("ranking_collect", segments, num_segments);
  STD_TORCH_CHECK(!max_positives || *max_positives >= 0, "ranking_collect: max_positives must be None or at least 0, got ",
                  max_positives.value_or(0));
  Tensor negatives = torch::stable::new_empty(logits[0], {mask_bytes(logits)}, ScalarType::Byte);
  std::vector<std::vector<int64_t>> found;
  uint64_t* words = words_of(negatives);
  int64_t found_count = 0;
  for (size_t level = 0; level < logits.size(); ++level) {
    const Tensor& target = targets[level];
    const int64_t count = logits[level].numel();
    if (count == 0) {
      found.emplace_back();
      continue;
    }
    if (!is_index_form(target)) {
      found.push_back(scan_dense(target, words));
    } else {
      const int64_t classes = logits[level].size(logits[level].dim() - 1), rows = count / classes;
      found.push_back(target.scalar_type() == ScalarType::Int
                          ? scan_labels(static_cast<const int32_t*>(target.const_data_ptr()), rows, classes, background_first, words)
                          : scan_labels(static_cast<const int64_t*>(target.const_data_ptr()), rows, classes, background_first, words));
    }
    words += mask_words(count);
    found_count += static_cast<int64_t>(found.back().size());
  }
  const int64_t capacity = max_positives.value_or(found_count);
  Tensor positives = torch::stable::new_empty(logits[0], {kRecordRows, capacity}, ScalarType::Double);
  double* records = static_cast<double*>(positives.mutable_data_ptr());
  int64_t slot = 0, first_index = 0;
  for (size_t level = 0; level < logits.size(); ++level) {
    const bool dense = !is_index_form(targets[level]);
    const int64_t count = std::min<int64_t>(static_cast<int64_t>(found[level].size()), capacity - slot);
    double *logit = records + kLogit * capacity + slot, *value = records + kQuality * capacity + slot;
    gather_elements(logits[level], found[level], 1, count, logit);
    if (dense) gather_elements(targets[level], found[level], 1, count, value);
    else if (quality.empty()) std::fill(value, value + count, 1.0);
    else gather_elements(quality[level], found[level], logits[level].size(logits[level].dim() - 1), count, value);
    for (int64_t i = 0; i < count; ++i) {
      if (!std::isfinite(logit[i]) || !std::isfinite(value[i])) logit[i] = kNaN;
      records[kSegment * capacity + slot + i] = 0;
      records[kIndex * capacity + slot + i] = static_cast<double>(first_index + found[level][i]);
    }
    slot += count;
    first_index += logits[level].numel();
  }
  for (; slot < capacity; ++slot) {
    records[kLogit * capacity + slot] = kNaN;
    records[kQuality * capacity + slot] = 0;
    records[kSegment * capacity + slot] = 0;
    records[kIndex * capacity + slot] = -1;
  }
  Tensor counts = torch::stable::new_empty(logits[0], {kCounts}, ScalarType::Long);
  int64_t* count = static_cast<int64_t*>(counts.mutable_data_ptr());
  count[kFound] = found_count;
  count[kNegatives] = 0;
  for (const uint64_t* word = words_of(negatives); word < words; ++word) count[kNegatives] += __builtin_popcountll(*word);
  return {positives, negatives, counts};
}

// ---- bin ---------------------------------------------------------------------------------------------------------------------

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

int64_t count_valid(const double* ranked, int64_t capacity) {
  return std::partition_point(ranked, ranked + capacity, [](double logit) { return !std::isnan(logit); }) - ranked;
}

// Without breakpoints the passes still look for NaN: one edge at the largest finite value keeps them free of a case of their own. It
// meets +inf only, whose sums nobody reads and whose line is 0.
template <class T>
std::vector<T> edges_or_highest(const double* edges, int64_t count) {
  return count > 0 ? distinct_edges<T>(edges, count) : std::vector<T>{std::numeric_limits<T>::max()};
}

// Calls clean(first cell, one past the last, edges before) and occupied(cell, first edge, one past the last) in ascending order.
template <class Clean, class Occupied>
void for_cells(const CellGrid& grid, const std::vector<float>& edges, const Clean& clean, const Occupied& occupied) {
  int32_t cell = 0, edge = 0;
  const int32_t count = static_cast<int32_t>(edges.size());
  while (edge < count) {
    const int32_t at = cell_of(grid, edges[edge]), begin = edge;
    if (cell < at) clean(cell, at, edge);
    while (edge < count && cell_of(grid, edges[edge]) == at) ++edge;
    occupied(at, begin, edge);
    cell = at + 1;
  }
  if (cell < num_cells(grid)) clean(cell, num_cells(grid), count);
}

// Everything a binning pass reads, and per task the sums that it writes.
template <class T>
struct BinTables {
  BinTables(const Breakpoints& points, double unit, double most, int64_t elements)
      : edges(edges_or_highest<T>(points.edges.data(), static_cast<int64_t>(points.edges.size()))),
        near{unit > 0 ? 1 / unit : 0, most} {
    if constexpr (std::is_same_v<T, float>) build_cells(unit, elements);
  }

  void build_cells(double unit, int64_t elements) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    grid = make_grid(edges, elements);
    cells.resize(num_cells(grid));
    for_cells(
        grid, edges,
        [&](int32_t begin, int32_t end, int32_t before) {
          std::fill(cells.begin() + begin, cells.begin() + end, BinCell{nan, static_cast<uint32_t>(before)});
        },
        [&](int32_t cell, int32_t begin, int32_t end) {
          const bool is_crowded = end - begin > 1 || (cell == 0 && grid.cuts_low) || (cell + 1 == num_cells(grid) && grid.cuts_high);
          cells[cell] = is_crowded ? BinCell{nan, kCrowded | static_cast<uint32_t>(begin)}
                                   : BinCell{edges[begin], static_cast<uint32_t>(begin)};
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
      return {edges.data(), count, grid, cells.data(), origin, far, origin * far.scale, near, sums, sums + count + 1};
    else
      return {edges.data(), count, near, sums + count + 1};
  }

  // Sums of one task: [2, edges + 1], far offsets before near ones.
  int64_t num_sums() const { return 2 * (static_cast<int64_t>(edges.size()) + 1); }

  // The sum of the offsets from the left breakpoint of bin `bin` > 0, in near units, of all its elements.
  int64_t near_sum(const BinSums* sums, int64_t bin) const {
    const BinSums& distant = sums[bin];
    const int64_t searched = sums[edges.size() + 1 + bin].sum;
    if (distant.count == 0) return searched;
    const int64_t left = fixed_point_offset(static_cast<double>(edges[bin - 1]) - origin, far.scale, far.most);
    return ((distant.sum - distant.count * left) << far_steps) + searched;
  }

  std::vector<T> edges;
  OffsetScale near, far{};
  CellGrid grid{};
  std::vector<BinCell> cells;
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
    if (is_covered) offsets[slot + 1] = tables.near_sum(sums, bin);
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
  const int64_t tasks = std::min(task_count(mask_words(elements), kWordsPerTask), std::max<int64_t>(2, elements / (4 * num_sums)));
  std::vector<BinSums> sums(static_cast<size_t>(tasks * num_sums));
  std::vector<int64_t> nan_counts(tasks, 0);
  for (const Tensor& level : logits) {
    const In* data = static_cast<const In*>(level.const_data_ptr());
    const int64_t count = level.numel(), level_words = mask_words(count);
    run_tasks(tasks, [&](int64_t task) {
      const int64_t begin = task_begin(level_words, tasks, task), end = task_begin(level_words, tasks, task + 1);
      if (begin == end) return;
      const auto pass = tables.pass(sums.data() + task * num_sums);
      nan_counts[task] += RSL_ISA_CALL(bin_negatives, data + begin * 64, std::min(end * 64, count) - begin * 64, words + begin, pass);
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
  check_logits(op, logits);
  check_unsegmented(op, segments, num_segments);
  check_vector(op, "negatives", negatives, logits[0], ScalarType::Byte, mask_bytes(logits));
  check_vector(op, "counts", counts, logits[0], ScalarType::Long, kCounts);
  check_table(op, "positives", positives, logits[0], ScalarType::Double, kRecordRows, -1);
  check_delta(op, delta);
  const int64_t capacity = positives.size(1), columns = 2 * capacity + 1;
  Tensor ranked = torch::stable::new_empty(logits[0], {kRecordRows, capacity}, ScalarType::Double);
  Tensor bins = torch::stable::new_empty(logits[0], {2, columns}, ScalarType::Long);
  double* sorted = static_cast<double*>(ranked.mutable_data_ptr());
  sort_records(static_cast<const double*>(positives.const_data_ptr()), sorted, capacity);
  const int64_t valid = count_valid(sorted, capacity);
  int64_t* bin_counts = static_cast<int64_t*>(bins.mutable_data_ptr());
  std::memset(bin_counts, 0, static_cast<size_t>(2 * columns) * sizeof(int64_t));
  const int bits = fixed_point_bits(count_elements(logits));
  const double unit = fixed_point_unit(delta, bits), most = static_cast<double>((int64_t{1} << bits) - 1);
  dispatch_floating(logits[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    const Breakpoints points = merge_breakpoints<Arithmetic<In>>(sorted, valid, delta);
    bin_counts[0] = stream_negatives<In>(logits, words_of(negatives), points, unit, most, bin_counts, bin_counts + columns);
  });
  return {ranked, bins};
}

// ---- backward ----------------------------------------------------------------------------------------------------------------

double upstream_value(const char* op, const char* name, const std::optional<Tensor>& grad) {
  if (!grad) return 0;
  STD_TORCH_CHECK(grad->numel() == 1 && is_floating(grad->scalar_type()) && grad->is_cpu(), op, ": ", name,
                  " must be a floating 0-d tensor on the CPU, got shape ", shape_of(*grad));
  return element(*grad, 0);
}

// A cell may hold one line in place of several if that is wrong by at most this share of the largest gradient of a positive.
constexpr double kLineTolerance = 0x1p-26;

// Everything a gradient pass reads. lines: the operator's, [3, columns].
template <class T>
struct GradientTables {
  GradientTables(const double* table, int64_t columns, double upstream, double largest, int64_t elements) {
    const int64_t slots = std::lower_bound(table, table + columns, std::numeric_limits<double>::infinity()) - table;
    const double *value = table + columns, *slope = table + 2 * columns;
    edges = edges_or_highest<T>(table, slots);
    exact.reserve(edges.size() + 1);
    exact.push_back({0, 0});
    for (int64_t slot = 0; slot < slots; ++slot)
      if (slot + 1 == slots || table[slot + 1] != table[slot]) exact.push_back({upstream * value[slot], upstream * slope[slot]});
    if (slots == 0) exact.push_back({0, 0});
    lines.reserve(exact.size());
    for (const Line<double>& line : exact) lines.push_back({static_cast<T>(line.value), static_cast<T>(line.slope)});
    if constexpr (std::is_same_v<T, float>) build_cells(kLineTolerance * largest, elements);
  }

  double at(int32_t bin, double s) const {
    return bin > 0 ? exact[bin].value + exact[bin].slope * (s - static_cast<double>(edges[bin - 1])) : 0;
  }

  void build_cells(double tolerance, int64_t elements) {
    grid = make_grid(edges, elements);
    cells.resize(num_cells(grid));
    for_cells(
        grid, edges,
        [&](int32_t begin, int32_t end, int32_t before) {
          RSL_ISA_CALL(fill_line_cells, cells.data() + begin, int64_t{end - begin}, at(before, start_of_cell(grid, begin)),
                       exact[before].slope * grid.width);
        },
        [&](int32_t cell, int32_t begin, int32_t end) {
          if (!fit_line(cell, begin, end, tolerance)) {
            cells[cell].value = std::numeric_limits<float>::quiet_NaN();
            std::memcpy(&cells[cell].slope, &begin, sizeof begin);
          }
        });
  }

  // The chord over the cell, if it is good enough at both sides of every breakpoint inside.
  bool fit_line(int32_t cell, int32_t begin, int32_t end, double tolerance) {
    if ((cell == 0 && grid.cuts_low) || (cell + 1 == num_cells(grid) && grid.cuts_high)) return false;
    const double left = start_of_cell(grid, cell);
    const double first = at(begin, left), step = at(end, left + grid.width) - first;
    for (int32_t edge = begin; edge < end; ++edge) {
      const double s = edges[edge], chord = first + step * (s - left) * static_cast<double>(grid.scale);
      const double below = std::fabs(at(edge, s) - chord), above = std::fabs(at(edge + 1, s) - chord);
      if (!(below <= tolerance && above <= tolerance)) return false;
    }
    cells[cell] = {static_cast<float>(first), static_cast<float>(step)};
    return true;
  }

  GradientPass<T> pass() const {
    return {edges.data(), static_cast<int32_t>(edges.size()), lines.data(), std::numeric_limits<T>::max(), grid, cells.data()};
  }

  std::vector<T> edges;
  std::vector<Line<double>> exact;  // by bin
  std::vector<Line<T>> lines;       // the same in T
  CellGrid grid{};
  std::vector<CellLine> cells;
};

template <class In>
void fill_nan(const Tensor& tensor) {
  In* data = static_cast<In*>(tensor.mutable_data_ptr());
  std::fill(data, data + tensor.numel(), In(static_cast<Arithmetic<In>>(kNaN)));
}

template <class In>
void stream_gradient(const Tensors& logits, const uint64_t* words, const GradientPass<Arithmetic<In>>& pass, const Tensors& gradients) {
  for (size_t level = 0; level < logits.size(); ++level) {
    const In* data = static_cast<const In*>(logits[level].const_data_ptr());
    In* gradient = static_cast<In*>(gradients[level].mutable_data_ptr());
    const int64_t count = logits[level].numel(), level_words = mask_words(count);
    const int64_t tasks = task_count(level_words, kWordsPerTask);
    run_tasks(tasks, [&](int64_t task) {
      const int64_t begin = task_begin(level_words, tasks, task), end = task_begin(level_words, tasks, task + 1);
      RSL_ISA_CALL(write_gradient, data + begin * 64, std::min(end * 64, count) - begin * 64, words + begin, pass, gradient + begin * 64);
    });
    words += level_words;
  }
}

double largest_gradient(const double* records, int64_t capacity, double first, double second) {
  double largest = 0;
  for (int64_t slot = 0; slot < capacity; ++slot)
    largest = std::fmax(largest, std::fabs(first * records[kFirst * capacity + slot] + second * records[kSecond * capacity + slot]));
  return largest;
}

// Writes the gradients of the positives; records come sorted by logit, so the flat indices are in any order.
template <class In>
void scatter_positives(const double* records, int64_t capacity, double first, double second, const Tensors& gradients) {
  std::vector<int64_t> begin{0};
  for (const Tensor& level : gradients) begin.push_back(begin.back() + level.numel());
  for (int64_t slot = 0; slot < capacity; ++slot) {
    const double stored = records[kGradientIndex * capacity + slot];
    if (!(stored >= 0 && stored < static_cast<double>(begin.back()))) continue;
    const int64_t index = static_cast<int64_t>(stored);
    const size_t level = static_cast<size_t>(std::upper_bound(begin.begin(), begin.end(), index) - begin.begin() - 1);
    const double value = first * records[kFirst * capacity + slot] + second * records[kSecond * capacity + slot];
    static_cast<In*>(gradients[level].mutable_data_ptr())[index - begin[level]] = In(static_cast<Arithmetic<In>>(value));
  }
}

Tensors ranking_backward(Tensors logits, Tensor negatives, Tensor gradients, Tensor lines, Tensor counts,
                         std::optional<Tensor> segments, int64_t num_segments, std::optional<Tensor> grad_first,
                         std::optional<Tensor> grad_second) {
  const char* op = "ranking_backward";
  check_logits(op, logits);
  check_unsegmented(op, segments, num_segments);
  check_vector(op, "negatives", negatives, logits[0], ScalarType::Byte, mask_bytes(logits));
  check_vector(op, "counts", counts, logits[0], ScalarType::Long, kCounts);
  check_table(op, "gradients", gradients, logits[0], ScalarType::Double, kGradientRows, -1);
  const int64_t capacity = gradients.size(1);
  check_table(op, "lines", lines, logits[0], ScalarType::Double, kLineRows, 2 * capacity);
  const double first = upstream_value(op, "grad_first", grad_first), second = upstream_value(op, "grad_second", grad_second);
  const bool overflowed = static_cast<const int64_t*>(counts.const_data_ptr())[kFound] > capacity;
  Tensors results;
  for (const Tensor& level : logits) results.push_back(torch::stable::empty_like(level));
  dispatch_floating(logits[0].scalar_type(), [&](auto tag) {
    using In = decltype(tag);
    if (overflowed) {
      for (const Tensor& result : results) fill_nan<In>(result);
      return;
    }
    const double* records = static_cast<const double*>(gradients.const_data_ptr());
    const GradientTables<Arithmetic<In>> tables(static_cast<const double*>(lines.const_data_ptr()), 2 * capacity, first,
                                                largest_gradient(records, capacity, first, second), count_elements(logits));
    stream_gradient<In>(logits, words_of(negatives), tables.pass(), results);
    scatter_positives<In>(records, capacity, first, second, results);
  });
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) {
  m.impl("ranking_collect.cpp", TORCH_BOX(&ranking_collect));
  m.impl("ranking_bin.cpp", TORCH_BOX(&ranking_bin));
  m.impl("ranking_backward.cpp", TORCH_BOX(&ranking_backward));
}

}  // namespace rsloss
