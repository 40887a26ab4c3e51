// Logits of 16 bits -> gradients by the table of all patterns, 0 where the mask says so. Reads 2 bytes and 1 bit, writes 2
// bytes per element. Compiled once per instruction set (common/for_each_isa.h).

// Of a word, `count` elements at most 64.
static inline void look_up_one_by_one(const uint16_t* logits, int64_t count, uint64_t negatives, const uint16_t* table,
                                      uint16_t* gradient) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i) gradient[i] = table[logits[i]];
  for (uint64_t others = ~negatives; others != 0; others &= others - 1) {
    const int64_t at = __builtin_ctzll(others);
    if (at >= count) break;
    gradient[at] = 0;
  }
}

#if RSL_ISA == 512

// Nearly all bfloat16 logits of a detector have one sign and one of three exponents: that much of the table fits in registers.
constexpr int kSameExponent = 128;  // patterns of bfloat16
constexpr int kWindow = 3 * kSameExponent;
constexpr int kWindowVectors = kWindow / 32;

// The first pattern of the window that most of a sample lies in; -1 where that is too few.
static int64_t find_window(const uint16_t* logits, int64_t count) {
  constexpr int kSample = 128, kExponents = kPatterns / kSameExponent;
  uint8_t found[kExponents] = {};
  for (int64_t i = 0; i < kSample; ++i) ++found[logits[count * i / kSample] / kSameExponent];
  int best = 0, most = 0;
  for (int i = 0; i + 2 < kExponents; ++i) {
    const int here = found[i] + found[i + 1] + found[i + 2];
    if (here > most) {
      best = i;
      most = here;
    }
  }
  return most >= kSample * 7 / 8 ? int64_t{best} * kSameExponent : -1;
}

// Full words. What lies outside the window is looked up in the table; where that is much, the whole word is.
static void look_up_in_window(const uint16_t* logits, int64_t words, const uint64_t* negatives, const uint16_t* table,
                              int64_t window, uint16_t* gradient) {
  __m512i entries[kWindowVectors];
  for (int i = 0; i < kWindowVectors; ++i) entries[i] = _mm512_loadu_si512(table + window + 32 * i);
  const __m512i first = _mm512_set1_epi16(static_cast<int16_t>(window));
  for (int64_t word = 0; word < words; ++word, logits += 64, gradient += 64) {
    prefetch_ahead<false>(logits);
    prefetch_ahead<true>(gradient);
    const uint64_t wanted = negatives[word];
    uint64_t outside = 0;
    for (int half = 0; half < 64; half += 32) {
      const __m512i at = _mm512_sub_epi16(_mm512_loadu_si512(logits + half), first);
      __m512i found = _mm512_permutex2var_epi16(entries[0], at, entries[1]);
#pragma GCC unroll 8
      for (int i = 2; i < kWindowVectors; i += 2) {
        const __mmask32 is_here = _mm512_cmpge_epu16_mask(at, _mm512_set1_epi16(static_cast<int16_t>(32 * i)));
        found = _mm512_mask_mov_epi16(found, is_here, _mm512_permutex2var_epi16(entries[i], at, entries[i + 1]));
      }
      _mm512_storeu_si512(gradient + half, _mm512_maskz_mov_epi16(static_cast<__mmask32>(wanted >> half), found));
      outside |= uint64_t{_mm512_cmpge_epu16_mask(at, _mm512_set1_epi16(kWindow))} << half;
    }
    outside &= wanted;
    if (__builtin_popcountll(outside) > 16) {
      look_up_one_by_one(logits, 64, wanted, table, gradient);
      continue;
    }
    for (; outside != 0; outside &= outside - 1) {
      const int at = __builtin_ctzll(outside);
      gradient[at] = table[logits[at]];
    }
  }
}

#endif

// logits, gradient: [count]. negatives: [words of count].
static void look_up_patterns(const uint16_t* logits, int64_t count, const uint64_t* negatives, const uint16_t* table,
                             uint16_t* gradient) {
  int64_t word = 0;
#if RSL_ISA == 512
  const int64_t window = count > 0 ? find_window(logits, count) : -1;
  if (window >= 0) {
    word = count / 64;
    look_up_in_window(logits, word, negatives, table, window, gradient);
  }
#endif
  for (; word * 64 < count; ++word) {
    const int64_t begin = word * 64, left = count - begin;
    prefetch_ahead<false>(logits + begin);
    prefetch_ahead<true>(gradient + begin);
    look_up_one_by_one(logits + begin, left < 64 ? left : 64, negatives[word], table, gradient + begin);
  }
}
