// Lines -> gradients of all patterns -> those of logits of 16 bits. For ranking_backward_cpu.cpp, after the vector code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "common/floating_cpu.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "ranking/patterns_cpu.h"

namespace rsloss {

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
    // Breakpoints at or below the last value; of NaN, behind which comes -inf, none.
    int64_t below = 0;
    for (int64_t stretch = task_begin(kStretches, tasks, task); stretch < task_begin(kStretches, tasks, task + 1); ++stretch) {
      const int64_t begin = stretch * kStretch, last = begin + kStretch - 1;
      while (below < slots && lines[below] <= value_of(begin)) ++below;
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
      RSL_ISA_CALL(look_up_patterns, data + begin * 64, std::min(end * 64, count) - begin * 64, words + begin,
                   reinterpret_cast<const uint16_t*>(table), gradient + begin * 64);
      positives.write(offset, begin * 64, std::min(end * 64, count), static_cast<In*>(gradients[level].mutable_data_ptr()));
    });
    words += level_words;
    offset += count;
  }
}

}  // namespace rsloss
