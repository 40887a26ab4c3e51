// Negatives of 16 bits -> counts by pattern -> bins. For ranking_bin_cpu.cpp, after the vector code.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ranking/patterns_cpu.h"
#include "ranking/ranking_sweep.h"

namespace rsloss {

constexpr int64_t kMostTasks = 2;

// Two rows whose counts of one pattern lie half a page apart: at the same place of two pages a load of the one would wait for a
// store to the other.
constexpr int64_t kRow = kPatterns + 2048 / sizeof(uint32_t);

// How often patterns occurred: two rows of counts for each of the tasks that count side by side, and which stretches of its own
// a task left something in. One is kept from call to call: clearing all of it costs more than clearing what was counted.
struct CountTable {
  uint32_t rows[kMostTasks][2][kRow];
  uint64_t occupied[kMostTasks][kStretches / 64];
};

inline std::atomic<CountTable*>& idle_table() {
  static std::atomic<CountTable*> idle{nullptr};
  return idle;
}

// The sums of the rows of all tasks.
class Histogram {
 public:
  explicit Histogram(int64_t tasks) : tasks_(tasks), table_(idle_table().exchange(nullptr)) {
    if (table_ == nullptr) table_ = new CountTable();
  }
  ~Histogram() {
    CountTable* none = nullptr;
    if (!idle_table().compare_exchange_strong(none, table_)) delete table_;
  }
  Histogram(const Histogram&) = delete;
  Histogram& operator=(const Histogram&) = delete;

  // A task clears and marks its own rows, in the cache where it counts.
  void clear(int64_t task) {
    for (int64_t stretch = 0; stretch < kStretches; ++stretch) {
      if ((table_->occupied[task][stretch / 64] >> stretch % 64 & 1) == 0) continue;
      for (uint32_t* row : table_->rows[task]) std::fill_n(row + stretch * kStretch, kStretch, 0);
    }
    std::fill_n(table_->occupied[task], kStretches / 64, 0);
  }

  // Counts the patterns of some negatives. ranges: [2], to which their patterns are added.
  void add(int64_t task, const uint16_t* logits, int64_t count, const uint64_t* negatives, PatternRange* ranges) {
    RSL_ISA_CALL(count_patterns, logits, count, negatives, table_->rows[task][0], table_->rows[task][1], ranges);
  }

  // Notes what a task counted, once it has counted all of it: `ranges` may be wide, and all of them is looked through.
  void mark(int64_t task, const PatternRange* ranges) {
    const uint32_t (&rows)[2][kRow] = table_->rows[task];
    for (int sign = 0; sign < 2; ++sign) {
      const PatternRange& range = ranges[sign];
      for (int64_t stretch = range.begin / kStretch; stretch * kStretch < range.end; ++stretch) {
        // A row may hold something although the sum of the rows is 0.
        uint32_t any = 0;
        for (int64_t i = stretch * kStretch; i < (stretch + 1) * kStretch; ++i) any |= rows[0][i] | rows[1][i];
        table_->occupied[task][stretch / 64] |= static_cast<uint64_t>(any != 0) << stretch % 64;
      }
    }
  }

  int64_t count(int64_t pattern) const {
    uint32_t sum = 0;
    for (int64_t task = 0; task < tasks_; ++task) sum += table_->rows[task][0][pattern] + table_->rows[task][1][pattern];
    return sum;
  }

  // Whether none of the patterns of a stretch occurs.
  bool is_empty(int64_t stretch) const {
    uint64_t any = 0;
    for (int64_t task = 0; task < tasks_; ++task) any |= table_->occupied[task][stretch / 64];
    return (any >> stretch % 64 & 1) == 0;
  }

 private:
  int64_t tasks_;
  CountTable* table_;
};

constexpr int64_t kWordsPerPiece = 512;

// Counts the patterns among the negatives of all tensors. beside: what one of the threads does before it helps.
template <class Beside>
void count_negatives(const Tensors& logits, const uint64_t* words, int64_t tasks, Histogram& counted, const Beside& beside) {
  // Thrown from here, as if nothing ran side by side: threads lose what an exception is.
  std::exception_ptr failure;
  std::vector<Shares> shares;
  for (const Tensor& level : logits) shares.emplace_back(mask_words(level.numel()), tasks, kWordsPerPiece);
  run_tasks(tasks, [&](int64_t task) {
    if (task == 0) {
      try {
        beside();
      } catch (...) {
        failure = std::current_exception();
      }
    }
    counted.clear(task);
    PatternRange ranges[2];
    const uint64_t* level_mask = words;
    for (size_t level = 0; level < logits.size(); ++level) {
      const uint16_t* data = static_cast<const uint16_t*>(logits[level].const_data_ptr());
      const int64_t count = logits[level].numel();
      shares[level].take(task, [&](int64_t begin, int64_t end) {
        counted.add(task, data + begin * 64, std::min(end * 64, count) - begin * 64, level_mask + begin, ranges);
      });
      level_mask += mask_words(count);
    }
    counted.mark(task, ranges);
  });
  if (failure) std::rethrow_exception(failure);
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
