// Logits of 16 bits -> how often each pattern occurs, and between which patterns all lie. Reads 2 bytes and 1 bit per element.
// Compiled once per instruction set (common/for_each_isa.h).

// The least and the largest of many patterns, as unsigned and as signed numbers, lane by lane: of positive floats `least` and
// `signed_most`, of negative ones `signed_least` and `most`.
struct PatternExtremes {
  static constexpr int kLanes = 32;
  uint16_t least[kLanes];
  uint16_t most[kLanes];
  int16_t signed_least[kLanes];
  int16_t signed_most[kLanes];

  PatternExtremes() {
    for (int i = 0; i < kLanes; ++i) {
      least[i] = 0xffff;
      most[i] = 0;
      signed_least[i] = 0x7fff;
      signed_most[i] = -0x8000;
    }
  }

  // i: the lane
  void add(int i, uint16_t pattern) {
    const int16_t as_signed = static_cast<int16_t>(pattern);
    least[i] = pattern < least[i] ? pattern : least[i];
    most[i] = pattern > most[i] ? pattern : most[i];
    signed_least[i] = as_signed < signed_least[i] ? as_signed : signed_least[i];
    signed_most[i] = as_signed > signed_most[i] ? as_signed : signed_most[i];
  }

  // Of both signs.
  void add_to(PatternRange* ranges) const {
    for (int i = 0; i < kLanes; ++i) {
      if (signed_most[i] >= 0) {
        ranges[0].add(least[i]);
        ranges[0].add(static_cast<uint16_t>(signed_most[i]));
      }
      if (signed_least[i] < 0) {
        ranges[1].add(static_cast<uint16_t>(signed_least[i]));
        ranges[1].add(most[i]);
      }
    }
  }
};

// Adds the elements whose bits are set to two rows of counts, [kPatterns] each, neighbours to different ones, so that runs of
// equal values do not wait for one another. A row alone may be off by a multiple of 2^32. ranges: [2], to which the patterns of
// all elements are added.
static void count_patterns(const uint16_t* logits, int64_t count, const uint64_t* negatives, uint32_t* even, uint32_t* odd,
                           PatternRange* ranges) {
  PatternExtremes extremes;
  for (int64_t word = 0; word * 64 < count; ++word) {
    const int64_t left = count - word * 64, size = left < 64 ? left : 64;
    const uint64_t mask = left < 64 ? negatives[word] & ((uint64_t{1} << left) - 1) : negatives[word];
    const uint16_t* values = logits + word * 64;
    prefetch_ahead<false>(values);
    if (left < 64) {
      for (int64_t i = 0; i < size; ++i) extremes.add(0, values[i]);
    } else {
      for (int i = 0; i < 64; i += PatternExtremes::kLanes)
        for (int lane = 0; lane < PatternExtremes::kLanes; ++lane) extremes.add(lane, values[i + lane]);
    }
    // Counting bits may be a call, which a word of negatives alone need not wait for.
    if (left < 64 || (~mask != 0 && __builtin_popcountll(mask) < 32)) {
      for (uint64_t bits = mask; bits != 0; bits &= bits - 1) ++even[values[__builtin_ctzll(bits)]];
      continue;
    }
    // Nearly all: count all, then take the others out.
    for (uint64_t bits = ~mask; bits != 0; bits &= bits - 1) --even[values[__builtin_ctzll(bits)]];
#pragma GCC unroll 32
    for (int i = 0; i < 64; i += 2) {
      ++even[values[i]];
      ++odd[values[i + 1]];
    }
  }
  extremes.add_to(ranges);
}
