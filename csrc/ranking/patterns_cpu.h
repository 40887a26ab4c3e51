// 16-bit logits take 65,536 values at most: many of them are counted by their bits, and one table of gradients serves all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "common/floating_cpu.h"
#include "common/parallel.h"
#include "ranking/ranking_sweep.h"

namespace rsloss {

constexpr int64_t kPatterns = 1 << 16;
constexpr int64_t kStretch = 64;  // neighbouring patterns that are treated at once where they are alike
constexpr int64_t kStretches = kPatterns / kStretch;
constexpr int kAhead = 1024;  // elements ahead of use that both passes prefetch

// Clearing, adding up and walking the counts, and filling the table, cost about as much as a quarter of a million elements
// save. A count of all elements fits 32 bits. All processes of a group must decide alike.
inline bool takes_patterns(const SegmentMap& segments, int64_t elements) {
  return segments.is_single() && elements >= int64_t{1} << 18 && elements < int64_t{1} << 32;
}

// The pattern of the i-th value in ascending order, negative NaN first, positive NaN last.
inline uint16_t pattern_at(int64_t i) {
  return static_cast<uint16_t>(i < kPatterns / 2 ? kPatterns - 1 - i : i - kPatterns / 2);
}

template <class In>
inline In from_pattern(uint16_t pattern) {
  In value;
  std::memcpy(&value, &pattern, sizeof value);
  return value;
}

template <class In>
inline uint16_t pattern_of(In value) {
  uint16_t pattern;
  std::memcpy(&pattern, &value, sizeof pattern);
  return pattern;
}

// The cache lines of the word that comes kAhead elements later, perhaps beyond the end.
template <bool kWrite>
inline void prefetch_ahead(const uint16_t* word) {
  for (int i = 0; i < 64; i += 32) __builtin_prefetch(word + kAhead + i, kWrite);
}

// Adds the elements whose bits are set to counts [2, kPatterns]; neighbours go to different rows, so that runs of equal values
// do not wait for one another. A row alone may be off by a multiple of 2^32.
inline void count_patterns(const uint16_t* logits, int64_t count, const uint64_t* negatives, uint32_t* counts) {
  uint32_t* others = counts + kPatterns;
  for (int64_t word = 0; word * 64 < count; ++word) {
    const int64_t left = count - word * 64;
    const uint64_t mask = left < 64 ? negatives[word] & ((uint64_t{1} << left) - 1) : negatives[word];
    const uint16_t* values = logits + word * 64;
    prefetch_ahead<false>(values);
    // Counting bits is a call here, which a word of negatives alone need not wait for.
    if (left < 64 || (~mask != 0 && __builtin_popcountll(mask) < 32)) {
      for (uint64_t bits = mask; bits != 0; bits &= bits - 1) ++counts[values[__builtin_ctzll(bits)]];
      continue;
    }
    // Nearly all: count all, then take the others out.
    for (uint64_t bits = ~mask; bits != 0; bits &= bits - 1) --counts[values[__builtin_ctzll(bits)]];
    for (int i = 0; i < 64; i += 4) {
      uint64_t four;
      std::memcpy(&four, values + i, sizeof four);
      ++counts[four & 0xffff];
      ++others[four >> 16 & 0xffff];
      ++counts[four >> 32 & 0xffff];
      ++others[four >> 48];
    }
  }
}

// How often every pattern occurs: the sum of the rows, [tasks, 2, kPatterns]. Most stretches are empty: each task marks the
// others while its rows are in its cache.
struct Histogram {
  int64_t tasks;
  std::unique_ptr<uint32_t[]> counts;
  std::unique_ptr<uint64_t[]> occupied;  // [tasks, stretches in bits]

  uint32_t* rows(int64_t task) { return &counts[task * 2 * kPatterns]; }

  int64_t count(int64_t pattern) const {
    uint32_t sum = 0;
    for (int64_t row = 0; row < 2 * tasks; ++row) sum += counts[row * kPatterns + pattern];
    return sum;
  }

  // Whether none of the patterns of a stretch occurs.
  bool is_empty(int64_t stretch) const {
    uint64_t any = 0;
    for (int64_t task = 0; task < tasks; ++task) any |= occupied[(task * kStretches + stretch) / 64];
    return (any >> stretch % 64 & 1) == 0;
  }

  void mark_occupied(int64_t task) {
    const uint32_t *even = rows(task), *odd = even + kPatterns;
    for (int64_t word = 0; word < kStretches / 64; ++word) {
      uint64_t bits = 0;
      for (int64_t bit = 0; bit < 64; ++bit) {
        uint32_t any = 0;
        for (int64_t i = (word * 64 + bit) * kStretch; i < (word * 64 + bit + 1) * kStretch; ++i) any |= even[i] | odd[i];
        bits |= static_cast<uint64_t>(any != 0) << bit;
      }
      occupied[task * kStretches / 64 + word] = bits;
    }
  }
};

// Counts the patterns among the negatives of all tensors: half a megabyte per thread, of which there are two at most.
template <class In>
Histogram histogram(const Tensors& logits, const uint64_t* words) {
  const int64_t tasks = std::min<int64_t>(2, task_count(mask_words(count_elements(logits)), kWordsPerTask));
  Histogram counted{tasks, std::unique_ptr<uint32_t[]>(new uint32_t[2 * tasks * kPatterns]),
                    std::unique_ptr<uint64_t[]>(new uint64_t[tasks * kStretches / 64])};
  run_tasks(tasks, [&](int64_t task) {
    uint32_t* rows = counted.rows(task);
    std::fill_n(rows, 2 * kPatterns, 0);
    const uint64_t* level_mask = words;
    for (const Tensor& level : logits) {
      const uint16_t* data = static_cast<const uint16_t*>(level.const_data_ptr());
      const int64_t count = level.numel(), level_words = mask_words(count);
      const int64_t begin = task_begin(level_words, tasks, task), end = task_begin(level_words, tasks, task + 1);
      count_patterns(data + begin * 64, std::min(end * 64, count) - begin * 64, level_mask + begin, rows);
      level_mask += level_words;
    }
    counted.mark_occupied(task);
  });
  return counted;
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

// The gradient of a negative by its pattern. lines: [3, columns], of which the first `slots` hold breakpoints.
template <class In>
std::unique_ptr<In[]> pattern_gradients(const double* lines, int64_t columns, int64_t slots, double upstream) {
  std::unique_ptr<In[]> table(new In[kPatterns]);
  const double *value = lines + columns, *slope = lines + 2 * columns;
  const auto value_of = [](int64_t i) { return static_cast<double>(widen(from_pattern<In>(pattern_at(i)))); };
  // By the line of which `below` breakpoints lie at or below the pattern. The last line is flat, up to infinity.
  const auto gradient = [&](int64_t i, int64_t below) {
    double result = below > 0 ? value[below - 1] : 0;
    if (below > 0 && slope[below - 1] != 0) result += slope[below - 1] * (value_of(i) - lines[below - 1]);
    return In(static_cast<float>(upstream * result));
  };
  const int64_t tasks = task_count(kPatterns, kPatterns / 8);
  run_tasks(tasks, [&](int64_t task) {
    for (int64_t stretch = task_begin(kStretches, tasks, task); stretch < task_begin(kStretches, tasks, task + 1); ++stretch) {
      const int64_t begin = stretch * kStretch, last = begin + kStretch - 1;
      // Behind NaN comes -inf, below all breakpoints.
      int64_t below = value_of(begin) == value_of(begin) ? std::upper_bound(lines, lines + slots, value_of(begin)) - lines : 0;
      // A line is monotone, and so is rounding: patterns between two with the same gradient have it too.
      if (value_of(begin) <= value_of(last) && !(below < slots && lines[below] <= value_of(last)) &&
          pattern_of(gradient(begin, below)) == pattern_of(gradient(last, below))) {
        std::fill_n(&table[std::min(pattern_at(begin), pattern_at(last))], kStretch, gradient(begin, below));
        continue;
      }
      for (int64_t i = begin; i <= last; ++i) {
        const double s = value_of(i);
        while (below < slots && lines[below] <= s) ++below;
        table[pattern_at(i)] = s == s ? gradient(i, below) : from_pattern<In>(pattern_at(i));
      }
    }
  });
  return table;
}

// logits, gradient: [count]. negatives: [words of count].
inline void look_up_patterns(const uint16_t* logits, int64_t count, const uint64_t* negatives, const uint16_t* table,
                             uint16_t* gradient) {
  for (int64_t word = 0; word * 64 < count; ++word) {
    const int64_t begin = word * 64, end = std::min(begin + 64, count);
    int64_t i = begin;
    prefetch_ahead<false>(logits + begin);
    prefetch_ahead<true>(gradient + begin);
    for (; i + 4 <= end; i += 4) {
      uint64_t four;
      std::memcpy(&four, logits + i, sizeof four);
      gradient[i] = table[four & 0xffff];
      gradient[i + 1] = table[four >> 16 & 0xffff];
      gradient[i + 2] = table[four >> 32 & 0xffff];
      gradient[i + 3] = table[four >> 48];
    }
    for (; i < end; ++i) gradient[i] = table[logits[i]];
    for (uint64_t others = ~negatives[word]; others != 0; others &= others - 1) {
      const int64_t at = begin + __builtin_ctzll(others);
      if (at >= end) break;
      gradient[at] = 0;
    }
  }
}

// positives.write(offset, begin, end, gradient) writes what no table holds.
template <class In, class Positives>
void write_pattern_gradients(const Tensors& logits, const uint64_t* words, const In* table, const Positives& positives,
                             const Tensors& gradients) {
  int64_t offset = 0;
  for (size_t level = 0; level < logits.size(); ++level) {
    const uint16_t* data = static_cast<const uint16_t*>(logits[level].const_data_ptr());
    uint16_t* gradient = static_cast<uint16_t*>(gradients[level].mutable_data_ptr());
    const int64_t count = logits[level].numel(), level_words = mask_words(count);
    const int64_t tasks = task_count(level_words, kWordsPerTask);
    run_tasks(tasks, [&](int64_t task) {
      const int64_t begin = task_begin(level_words, tasks, task), end = task_begin(level_words, tasks, task + 1);
      look_up_patterns(data + begin * 64, std::min(end * 64, count) - begin * 64, words + begin,
                       reinterpret_cast<const uint16_t*>(table), gradient + begin * 64);
      positives.write(offset, begin * 64, std::min(end * 64, count), static_cast<In*>(gradients[level].mutable_data_ptr()));
    });
    words += level_words;
    offset += count;
  }
}

}  // namespace rsloss
