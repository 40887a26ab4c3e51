// Negatives of 16 bits -> counts by pattern -> bins. For ranking_bin_cpu.cpp, after the vector code.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ranking/patterns_cpu.h"
#include "ranking/ranking_sweep.h"

namespace rsloss {

// [2 * kMostTasks, kPatterns], all zeros whenever nobody has it: one is kept from call to call, for clearing it costs more than
// clearing what was counted.
constexpr int64_t kMostTasks = 2;

class ZeroedCounts {
 public:
  ZeroedCounts() : counts_(idle().exchange(nullptr)) {
    if (counts_ == nullptr) counts_ = new uint32_t[2 * kMostTasks * kPatterns]();
  }
  // They must be zeros again.
  ~ZeroedCounts() {
    uint32_t* none = nullptr;
    if (!idle().compare_exchange_strong(none, counts_)) delete[] counts_;
  }
  ZeroedCounts(const ZeroedCounts&) = delete;
  ZeroedCounts& operator=(const ZeroedCounts&) = delete;

  uint32_t* row(int64_t i) const { return counts_ + i * kPatterns; }

 private:
  static std::atomic<uint32_t*>& idle() {
    static std::atomic<uint32_t*> kept{nullptr};
    return kept;
  }

  uint32_t* counts_;
};

// How often every pattern occurs: the sum of the rows, two per task. Most stretches are empty: each task marks the others while
// its rows are in its cache.
class Histogram {
 public:
  explicit Histogram(int64_t tasks) : tasks_(tasks) {}

  ~Histogram() {
    for (int64_t stretch = 0; stretch < kStretches; ++stretch) {
      if (is_empty(stretch)) continue;
      for (int64_t row = 0; row < 2 * tasks_; ++row) std::fill_n(counts_.row(row) + stretch * kStretch, kStretch, 0);
    }
  }
  Histogram(const Histogram&) = delete;
  Histogram& operator=(const Histogram&) = delete;

  int64_t count(int64_t pattern) const {
    uint32_t sum = 0;
    for (int64_t row = 0; row < 2 * tasks_; ++row) sum += counts_.row(row)[pattern];
    return sum;
  }

  // Whether none of the patterns of a stretch occurs.
  bool is_empty(int64_t stretch) const {
    uint64_t any = 0;
    for (int64_t task = 0; task < tasks_; ++task) any |= occupied_[task][stretch / 64];
    return (any >> stretch % 64 & 1) == 0;
  }

  // Counts the patterns of some negatives.
  void add(int64_t task, const uint16_t* logits, int64_t count, const uint64_t* negatives) {
    PatternRange ranges[2];
    RSL_ISA_CALL(count_patterns, logits, count, negatives, counts_.row(2 * task), ranges);
    const uint32_t *even = counts_.row(2 * task), *odd = counts_.row(2 * task + 1);
    for (const PatternRange& range : ranges) {
      for (int64_t stretch = range.begin / kStretch; stretch * kStretch < range.end; ++stretch) {
        // A row may hold something although the sum of the rows is 0.
        uint32_t any = 0;
        for (int64_t i = stretch * kStretch; i < (stretch + 1) * kStretch; ++i) any |= even[i] | odd[i];
        occupied_[task][stretch / 64] |= static_cast<uint64_t>(any != 0) << stretch % 64;
      }
    }
  }

 private:
  int64_t tasks_;
  ZeroedCounts counts_;
  uint64_t occupied_[kMostTasks][kStretches / 64] = {};
};

// Counts the patterns among the negatives of all tensors.
template <class In>
void count_negatives(const Tensors& logits, const uint64_t* words, int64_t tasks, Histogram& counted) {
  run_tasks(tasks, [&](int64_t task) {
    const uint64_t* level_mask = words;
    for (const Tensor& level : logits) {
      const uint16_t* data = static_cast<const uint16_t*>(level.const_data_ptr());
      const int64_t count = level.numel(), level_words = mask_words(count);
      const int64_t begin = task_begin(level_words, tasks, task), end = task_begin(level_words, tasks, task + 1);
      counted.add(task, data + begin * 64, std::min(end * 64, count) - begin * 64, level_mask + begin);
      level_mask += level_words;
    }
  });
}

// Adds all counted values to the bins of `edges`, [edges + 1]; returns the number of NaN.
template <class In>
int64_t bin_histogram(const Histogram& counted, const std::vector<float>& edges, OffsetScale scale, BinSums* sums) {
  int64_t nan_count = 0;
  size_t bin = 0;
  for (int64_t i = 0; i < kPatterns; ++i) {
    if (i % kStretch == 0 && counted.is_empty(pattern_at(i) / kStretch)) {
      i += kStretch - 1;
      continue;
    }
    const uint16_t pattern = pattern_at(i);
    const int64_t count = counted.count(pattern);
    if (count == 0) continue;
    const float value = widen(from_pattern<In>(pattern));
    if (value != value) {
      nan_count += count;
      continue;
    }
    while (bin < edges.size() && edges[bin] <= value) ++bin;
    if (bin == 0) continue;
    const double distance = static_cast<double>(value) - static_cast<double>(edges[bin - 1]);
    sums[bin].count += count;
    sums[bin].sum += count * fixed_point_offset(distance, scale.scale, scale.most);
  }
  return nan_count;
}

}  // namespace rsloss
