// 16-bit logits take 65,536 values at most: many of them are counted by their bits (pattern_counts_cpu.h), and one table of
// gradients serves all (pattern_gradients_cpu.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "ranking/segments_cpu.h"

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

// Patterns [begin, end); none where these are the other way round.
struct PatternRange {
  int64_t begin = kPatterns;
  int64_t end = 0;

  void add(int64_t pattern) {
    begin = pattern < begin ? pattern : begin;
    end = pattern >= end ? pattern + 1 : end;
  }
};

// The cache lines of the word that comes kAhead elements later, perhaps beyond the end.
template <bool kWrite>
inline void prefetch_ahead(const uint16_t* word) {
  for (int i = 0; i < 64; i += 32) __builtin_prefetch(word + kAhead + i, kWrite);
}

}  // namespace rsloss
