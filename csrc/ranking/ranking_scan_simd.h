// Dense targets -> bit masks of negatives and positives. Reads 4 bytes, writes 2 bits per element.
// Compiled once per instruction set (common/for_each_isa.h). Elements come in words of 64, one bit of the mask each: full words
// of 16- or 32-bit floats take the vector path; float64 and the last, partial word take the scalar one, which computes the
// same.
#include "ranking/ranking_simd.h"

template <class In>
static void scan_word(const In* targets, int64_t count, uint64_t& negatives, uint64_t& positives) {
  negatives = positives = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto target = widen(targets[i]);
    negatives |= uint64_t{target == 0} << i;
    positives |= uint64_t{!(target <= 0)} << i;
  }
}

#if RSL_ISA != 0

template <class In>
static void scan_full_word(const In* targets, uint64_t& negatives, uint64_t& positives) {
  negatives = positives = 0;
  const Floats zero = broadcast(0);
  for (int i = 0; i < 64; i += kLanes) __builtin_prefetch(targets + 1024 + i);
  for (int i = 0; i < 64; i += kLanes) {
    const Floats target = load(targets + i);
    negatives |= static_cast<uint64_t>(equal(target, zero)) << i;
    positives |= static_cast<uint64_t>(not_at_most(target, zero)) << i;
  }
}

#endif

// targets: [count]. negatives, positives: [words of count].
template <class In>
static void scan_targets(const In* targets, int64_t count, uint64_t* negatives, uint64_t* positives) {
  int64_t word = 0;
#if RSL_ISA != 0
  if constexpr (has_vectors<In>())
    for (; (word + 1) * 64 <= count; ++word) scan_full_word(targets + word * 64, negatives[word], positives[word]);
#endif
  for (; word * 64 < count; ++word) {
    const int64_t left = count - word * 64;
    scan_word(targets + word * 64, left < 64 ? left : 64, negatives[word], positives[word]);
  }
}

static int64_t count_bits(const uint64_t* words, int64_t count) {
  int64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits += __builtin_popcountll(words[i]);
  return bits;
}
