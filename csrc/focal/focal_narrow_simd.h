// The losses of targets of 0 with 16-bit logits by a table: between -2^-8 and -28 there are so few numbers that the pass
// computes the loss of each once, as focal_background_simd.h does. Gradients by one, a store for each, took longer. Part of
// focal_simd.h.

// The logits from a place on; behind the last place any.
template <class In>
static inline FloatVec narrow_logits(int first) {
  uint16_t bits[kFloats];
  for (int lane = 0; lane < kFloats; ++lane) bits[lane] = static_cast<uint16_t>(first + lane);
  In logits[kFloats];
  __builtin_memcpy(logits, bits, sizeof bits);
  return load_floats(logits);
}

// losses: room for whole vectors and one more.
template <class In>
static void fill_narrow_losses(const FocalTable& table, double* losses) {
  const int count = table.narrow.count;
  with_gamma(table, [&](auto gamma) {
    constexpr int kGamma = decltype(gamma)::value;
    // There is no table for any other gamma.
    if constexpr (kGamma >= 0) {
      for (int i = 0; i < count; i += kFloats) {
        const CoarseFloat e = exp_minus_coarse<0>(distance_below(narrow_logits<In>(table.narrow.first + i)), FloatVec{});
        const FloatSum loss = modulated_entropy<kGamma>(e);
        DoublePair sum = widen_floats(loss.high);
        add_doubles(sum, widen_floats(loss.low));
        store_doubles(losses + i, sum);
      }
    }
  });
  losses[count] = 0;
}

// The places of 64 logits, `count` where there is none; returns who has one.
static inline uint64_t find_places(const void* logits, const NarrowLosses& narrow, uint16_t* places) {
#if RSL_ISA == 512
  uint64_t within = 0;
  for (int half = 0; half < 2; ++half) {
    const __m512i bits = _mm512_loadu_si512(static_cast<const uint16_t*>(logits) + 32 * half);
    const __m512i place = _mm512_sub_epi16(bits, _mm512_set1_epi16(static_cast<int16_t>(narrow.first)));
    const __m512i count = _mm512_set1_epi16(static_cast<int16_t>(narrow.count));
    within |= uint64_t{_mm512_cmplt_epu16_mask(place, count)} << 32 * half;
    _mm512_storeu_si512(places + 32 * half, _mm512_min_epu16(place, count));
  }
  return within;
#elif RSL_ISA == 256
  uint64_t within = 0;
  const __m256i first = _mm256_set1_epi16(static_cast<int16_t>(narrow.first));
  const __m256i count = _mm256_set1_epi16(static_cast<int16_t>(narrow.count)),
                last = _mm256_sub_epi16(count, _mm256_set1_epi16(1));
  for (int i = 0; i < 64; i += 32) {
    __m256i is_within[2];
    for (int half = 0; half < 2; ++half) {
      const __m256i* bits = reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(logits) + i + 16 * half);
      const __m256i place = _mm256_sub_epi16(_mm256_loadu_si256(bits), first);
      is_within[half] = _mm256_cmpeq_epi16(_mm256_min_epu16(place, last), place);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(places + i + 16 * half), _mm256_min_epu16(place, count));
    }
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(is_within[0], is_within[1]), 0xd8);
    within |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(packed))} << i;
  }
  return within;
#else
  uint16_t bits[64];
  uint64_t within = 0;
  __builtin_memcpy(bits, logits, sizeof bits);
  for (int i = 0; i < 64; ++i) {
    const uint16_t place = static_cast<uint16_t>(bits[i] - narrow.first);
    within |= uint64_t{place < narrow.count} << i;
    places[i] = place < narrow.count ? place : narrow.count;
  }
  return within;
#endif
}

// Places of the targets of 0 of a block in whole words, of other elements `count`; the targets of 0 without one are left over.
// False: so many are that the table would not pay.
template <class In>
static inline bool find_places(const In* logits, const FocalBlock& block, const NarrowLosses& narrow, uint16_t* places,
                               uint64_t* left_over) {
  int left = 0;
  for (int word = 0; word < block.words(); ++word) {
    const int begin = 64 * word, size = block.size - begin < 64 ? block.size - begin : 64;
    In padded[64] = {};
    const In* own = logits + begin;
    if (size < 64) __builtin_memcpy(padded, own, static_cast<size_t>(size) * sizeof(In)), own = padded;
    const uint64_t within = find_places(own, narrow, places + begin);
    left_over[word] = block.negative[word] & ~within;
    left += __builtin_popcountll(left_over[word]);
    for (uint64_t bits = ~(block.negative[word] & within); bits != 0; bits &= bits - 1)
      places[begin + __builtin_ctzll(bits)] = narrow.count;
  }
  return left <= block.size / 8;
}

// The logits of words that hold others, in float; returns whether any do.
template <class In>
static inline bool widen_others(const In* logits, const FocalBlock& block, const uint64_t* left_over, float* widened) {
  bool any = false;
  for (int word = 0; word < block.words(); ++word) {
    if ((left_over[word] | block.one[word] | block.soft[word]) == 0) continue;
    const int begin = 64 * word;
    widen_values(logits + begin, block.size - begin < 64 ? block.size - begin : 64, widened + begin);
    any = true;
  }
  return any;
}

// places: whole words.
static inline double sum_by_places(const double* losses, const uint16_t* places, int words) {
  double sums[8] = {};
  for (int i = 0; i < 64 * words; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += losses[places[i + k]];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}
