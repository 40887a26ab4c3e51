// The last step of Rank & Sort on the CPU: losses and gradient tables from ranked positives and bins.
// The sums over positives go by blocks in order of quality: prefix sums over all worse (or better) blocks, all pairs inside a
// block; O(P^1.5) time, 32 bytes per positive and thread.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/new_tensor_cpu.h"
#include "common/parallel.h"
#include "common/sort_doubles.h"
#include "rank_sort/rank_sort.h"
#include "ranking/ranking_checks.h"
#include "ranking/windows_cpu.h"

#define RSL_SIMD_BODY "rank_sort/rank_sort_simd.h"
#include "common/for_each_isa.h"

namespace rsloss {
namespace {

constexpr int64_t kPadding = 8;     // pair_sums reads whole vectors
constexpr int64_t kAllPairs = 192;  // up to here one block: comparing all pairs is fastest
constexpr int64_t kPositivesPerTask = 256;

// The positives in ascending order of quality, cut into blocks that never split a tie.
struct ByQuality {
  std::vector<int32_t> rank;         // [V] rank by logit
  std::vector<int32_t> position;     // [V] inverse of rank
  std::vector<int32_t> group_begin;  // [V] first position with the same quality
  std::vector<int32_t> group_end;    // [V] one past the last
  std::vector<int32_t> block_begin;  // [blocks + 1]
  std::vector<double> logit;         // [V + padding]
  std::vector<double> quality;       // [V + padding]
};

ByQuality order_by_quality(const Windows& windows, const double* quality) {
  const int32_t count = static_cast<int32_t>(windows.count);
  ByQuality by{std::vector<int32_t>(count),
               std::vector<int32_t>(count),
               std::vector<int32_t>(count),
               std::vector<int32_t>(count),
               {0},
               std::vector<double>(count + kPadding),
               std::vector<double>(count + kPadding)};
  std::vector<SortKey> keys(count);
  for (int32_t r = 0; r < count; ++r) keys[r] = {ordered_bits(quality[r]), r};
  sort_keys(keys);
  const int32_t block = count <= kAllPairs ? count : static_cast<int32_t>(2 * std::sqrt(static_cast<double>(count)));
  for (int32_t begin = 0; begin < count;) {
    int32_t end = begin;
    for (; end < count && keys[end].bits == keys[begin].bits; ++end) {
      by.rank[end] = keys[end].slot;
      by.position[keys[end].slot] = end;
      by.group_begin[end] = begin;
      by.logit[end] = windows.centre[keys[end].slot];
      by.quality[end] = quality[keys[end].slot];
    }
    std::fill(by.group_end.begin() + begin, by.group_end.begin() + end, end);
    if (end - by.block_begin.back() >= block) by.block_begin.push_back(end);
    begin = end;
  }
  if (by.block_begin.back() != count) by.block_begin.push_back(count);
  return by;
}

// Runs body(first block, one past the last block) on several threads.
template <class Body>
void for_blocks(const ByQuality& by, const Body& body) {
  const int64_t blocks = static_cast<int64_t>(by.block_begin.size()) - 1;
  const int64_t count = static_cast<int64_t>(by.rank.size());
  const int64_t tasks = limit_by_memory(std::min(blocks, task_count(count, kPositivesPerTask)), 32 * count);
  if (blocks == 0) return;
  run_tasks(tasks, [&](int64_t task) { body(task_begin(blocks, tasks, task), task_begin(blocks, tasks, task + 1)); });
}

double slope_of(double delta) { return delta > 0 ? 1 / (2 * delta) : 0; }

struct HSums {
  double plain;
  double quality;
};

// Sums of H(s_j - s_i) and of H y_j from prefix sums {1, y, offset, offset y}.
HSums look_up(const double* prefix, const Windows& windows, int32_t i, double slope) {
  const double *low = prefix + 4 * windows.lower[i], *high = prefix + 4 * windows.upper[i], *all = prefix + 4 * windows.count;
  const double centre = windows.offset[i];
  const double inside = high[0] - low[0], inside_quality = high[1] - low[1];
  return {all[0] - high[0] + 0.5 * inside + (high[2] - low[2] - inside * centre) * slope,
          all[1] - high[1] + 0.5 * inside_quality + (high[3] - low[3] - inside_quality * centre) * slope};
}

std::vector<QualitySums> compare_qualities(const Windows& windows, const ByQuality& by, const double* quality) {
  const int64_t count = windows.count;
  const double slope = slope_of(windows.delta);
  std::vector<double> rows(4 * count), total(4 * (count + 1)), worse(count, 0), worse_quality(count, 0);
  for (int64_t r = 0; r < count; ++r) {
    rows[4 * r] = 1;
    rows[4 * r + 1] = quality[r];
    rows[4 * r + 2] = windows.offset[r];
    rows[4 * r + 3] = windows.offset[r] * quality[r];
  }
  RSL_ISA_CALL(prefix_qualities, rows.data(), by.position.data(), count, 0, static_cast<int32_t>(count), total.data());
  for_blocks(by, [&](int64_t first, int64_t last) {
    std::vector<double> prefix(4 * (count + 1));
    for (int64_t block = first; block < last; ++block) {
      const int32_t begin = by.block_begin[block], end = by.block_begin[block + 1];
      if (begin > 0) {
        RSL_ISA_CALL(prefix_qualities, rows.data(), by.position.data(), count, 0, begin, prefix.data());
        for (int32_t p = begin; p < end; ++p) {
          const HSums sums = look_up(prefix.data(), windows, by.rank[p], slope);
          worse[by.rank[p]] = sums.plain;
          worse_quality[by.rank[p]] = sums.quality;
        }
      }
      RSL_ISA_CALL(add_worse_in_block, by.logit.data(), by.quality.data(), by.group_begin.data(), by.rank.data(), begin, end,
                   slope, worse.data(), worse_quality.data());
    }
  });
  std::vector<QualitySums> sums(count);
  for (int32_t i = 0; i < count; ++i) {
    const HSums all = look_up(total.data(), windows, i, slope);
    const double better = all.plain - worse[i];
    sums[i] = clamp_sums(
        {worse[i], quality[i] * worse[i] - worse_quality[i], better, all.quality - worse_quality[i] - quality[i] * better});
  }
  return sums;
}

// The sum over better positives i of weight_i H(s_j - s_i), for every positive j.
std::vector<double> pull_of_better(const Windows& windows, const ByQuality& by, const std::vector<double>& weight) {
  const int64_t count = windows.count;
  const double slope = slope_of(windows.delta);
  std::vector<double> rows(2 * count), by_quality(count + kPadding), pull(count, 0);
  for (int64_t r = 0; r < count; ++r) {
    rows[2 * r] = weight[r];
    rows[2 * r + 1] = weight[r] * windows.offset[r];
    by_quality[by.position[r]] = weight[r];
  }
  for_blocks(by, [&](int64_t first, int64_t last) {
    std::vector<double> prefix(2 * (count + 1));
    for (int64_t block = first; block < last; ++block) {
      const int32_t begin = by.block_begin[block], end = by.block_begin[block + 1];
      if (end < count) {
        RSL_ISA_CALL(prefix_weights, rows.data(), by.position.data(), count, end, static_cast<int32_t>(count), prefix.data());
        for (int32_t p = begin; p < end; ++p) {
          const int32_t j = by.rank[p];
          const double *low = &prefix[2 * windows.lower[j]], *high = &prefix[2 * windows.upper[j]];
          const double inside = high[0] - low[0];
          pull[j] = prefix[2 * windows.full_end[j]] + 0.5 * inside - (high[1] - low[1] - inside * windows.offset[j]) * slope;
        }
      }
      RSL_ISA_CALL(add_pull_in_block, by.logit.data(), by_quality.data(), by.group_end.data(), by.rank.data(), begin, end,
                   slope, pull.data());
    }
  });
  return pull;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rank_sort_finalize(Tensors logits, Tensor negatives, Tensor ranked, Tensor counts,
                                                              Tensor bins, std::optional<Tensor> segments, int64_t num_segments,
                                                              double delta, double gradient_scale, bool) {
  const char* op = "rank_sort_finalize";
  check_delta(op, delta);
  const int64_t capacity =
      check_collected(op, logits, negatives, counts, segments, num_segments, "ranked", ranked, kRecordRows);
  const int64_t columns = 2 * capacity + 1;
  check_table(op, "bins", bins, logits[0], ScalarType::Long, 2, columns);

  const bool is_double = logits[0].scalar_type() == ScalarType::Double;
  const double* logit = static_cast<const double*>(ranked.const_data_ptr());
  const double* quality = logit + kQuality * capacity;
  const double* index = logit + kIndex * capacity;
  const int64_t* bin_counts = static_cast<const int64_t*>(bins.const_data_ptr());
  const int64_t count = count_valid(logit, capacity);
  const Windows windows = is_double ? make_windows<double>(logit, count, delta) : make_windows<float>(logit, count, delta);
  const ByQuality by = order_by_quality(windows, quality);
  const double unit =
      fixed_point_unit(delta, fixed_point_bits(static_cast<const int64_t*>(counts.const_data_ptr())[kElements]));
  const std::vector<double> false_positive = false_positives(windows, bin_counts, bin_counts + columns, unit);
  const std::vector<QualitySums> sums = compare_qualities(windows, by, quality);

  const double scale = gradient_scale / static_cast<double>(std::max<int64_t>(count, 1));
  std::vector<double> coefficient(count), weight(count);
  Tensor gradients = new_cpu_tensor({kGradientRows, capacity}, ScalarType::Double);
  double* record = static_cast<double*>(gradients.mutable_data_ptr());
  double ranking = 0, sorting = 0;
  for (int64_t i = 0; i < count; ++i) {
    const RankSortTerms terms = rank_sort_terms(sums[i], false_positive[i]);
    ranking += terms.ranking_error;
    sorting += terms.sorting_error;
    coefficient[i] = terms.coefficient * scale;
    weight[i] = terms.weight;
    record[kFirst * capacity + i] = terms.ranking_gradient * scale;
    record[kSecond * capacity + i] = terms.sorting_gradient;
  }
  const std::vector<double> pull = pull_of_better(windows, by, weight);
  for (int64_t i = 0; i < count; ++i) record[kSecond * capacity + i] = (record[kSecond * capacity + i] + pull[i]) * scale;

  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  bool is_broken = static_cast<const int64_t*>(counts.const_data_ptr())[kFound] > capacity || bin_counts[0] > 0;
  for (int64_t i = 0; i < capacity; ++i) {
    record[kGradientIndex * capacity + i] = index[i];
    record[kGradientSegment * capacity + i] = i < count ? 0 : static_cast<double>(num_segments);
  }
  for (int64_t i = count; i < capacity; ++i) {
    const bool is_invalid = index[i] >= 0;
    is_broken |= is_invalid;
    record[kFirst * capacity + i] = record[kSecond * capacity + i] = is_invalid ? nan : 0;
  }
  Tensor lines = new_cpu_tensor({kLineRows, 2 * capacity}, ScalarType::Double);
  write_lines(windows, coefficient.data(), static_cast<double*>(lines.mutable_data_ptr()), 2 * capacity);

  const double divisor = static_cast<double>(std::max<int64_t>(count, 1));
  const auto loss = [&](double sum) {
    Tensor result = new_cpu_tensor({}, is_double ? ScalarType::Double : ScalarType::Float);
    const double value = is_broken ? nan : sum / divisor;
    if (is_double) *static_cast<double*>(result.mutable_data_ptr()) = value;
    else *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
    return result;
  };
  return {loss(ranking), loss(sorting), gradients, lines};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rsloss_kernels, CPU, m) { m.impl("rank_sort_finalize.cpp", TORCH_BOX(&rank_sort_finalize)); }

}  // namespace rsloss
