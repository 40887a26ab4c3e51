// The streaming passes over the elements, compiled once per instruction set (see common/for_each_isa.h).
//   scan_targets   dense targets -> bit masks of negatives and positives                   reads 4 B, writes 2 bits per element
//   bin_negatives  negatives at or above the first breakpoint -> counts and fixed-point sums       reads 4 B + 1 bit
//   write_gradient lines -> gradient of every element, 0 where the mask says so                    reads 4 B + 1 bit, writes 4 B
// Elements come in words of 64, one bit of the mask each. A full word of 16- or 32-bit floats takes the vector path; float64 and the
// last, partial word take the scalar one, which computes the same.

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(Half x) { return static_cast<float>(x); }
static inline float widen(BFloat16 x) { return static_cast<float>(x); }

// ---- one element -------------------------------------------------------------------------------------------------------------

static inline void bin_one(BinSums* sums, uint32_t index, double distance, FixedPointScale fixed) {
  sums[index].count += 1;
  sums[index].sum += fixed_point_offset(distance < 0 ? -distance : distance, fixed.scale, fixed.most);
}

template <class In, class Table, class T>
static void bin_word(const In* logits, uint64_t negatives, const Table& table, T first, FixedPointScale fixed, BinSums* sums,
                     int64_t& nan_count) {
  for (; negatives != 0; negatives &= negatives - 1) {
    const T value = widen(logits[__builtin_ctzll(negatives)]);
    if (value != value) {
      ++nan_count;
    } else if (value >= first) {
      const auto found = find(table, value);
      bin_one(sums, found.index, static_cast<double>(value) - static_cast<double>(found.breakpoint), fixed);
    }
  }
}

// `highest` is the largest finite value: +inf takes the last line, whose slope is 0.
template <class T, class Table>
static inline T gradient_of(T value, const Table& table, T first, T highest, const Line<T>* lines) {
  if (value != value) return value;
  if (!(value >= first)) return 0;
  const auto found = find(table, value);
  const T bounded = value < highest ? value : highest;
  return lines[found.index].value + lines[found.index].slope * (bounded - found.breakpoint);
}

template <class In, class Table, class T>
static void gradient_word(const In* logits, int64_t count, uint64_t negatives, const Table& table, T first, T highest,
                          const Line<T>* lines, In* gradient) {
  for (int64_t i = 0; i < count; ++i) {
    const bool is_negative = negatives >> i & 1;
    gradient[i] = In(is_negative ? gradient_of<T>(widen(logits[i]), table, first, highest, lines) : T(0));
  }
}

template <class In>
static void scan_word(const In* targets, int64_t count, uint64_t& negatives, uint64_t& positives) {
  negatives = positives = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto target = widen(targets[i]);
    negatives |= uint64_t{target == 0} << i;
    positives |= uint64_t{!(target <= 0)} << i;
  }
}

// ---- vectors of 32-bit floats ------------------------------------------------------------------------------------------------

#if RSL_ISA == 512

constexpr int kLanes = 16;
using Floats = __m512;

static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline Floats load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline Floats load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
static inline void store(Half* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
static inline uint32_t equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline uint32_t not_at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
static inline uint32_t at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
static inline uint32_t not_below(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
static inline uint32_t is_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
static inline Floats select(uint32_t mask, Floats x) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), x); }
static inline void compress(float* p, Floats x, uint32_t mask) {
  _mm512_storeu_ps(p, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), x));
}

struct Entries {
  __m512i first;   // low 32 bits of 16 gathered pairs, as floats
  __m512i second;  // high 32 bits
};

// 16 pairs of 32-bit values by 64-bit gathers: half the loads of two 32-bit gathers.
static inline Entries gather_pairs(const void* base, __m512i index) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i low = _mm512_i32gather_epi64(_mm512_castsi512_si256(index), base, 8);
  const __m512i high = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(index, 1), base, 8);
  return {_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, _mm512_or_si512(even, _mm512_set1_epi32(1)), high)};
}

struct Located {
  __m512i index;
  Floats breakpoint;
};

static inline Located locate(const CellTable& table, Floats x) {
  Floats position = _mm512_mul_ps(_mm512_sub_ps(x, broadcast(table.origin)), broadcast(table.scale));
  // The order of the operands sends NaN to cell 0.
  position = _mm512_min_ps(_mm512_max_ps(position, _mm512_setzero_ps()), broadcast(table.last_cell));
  const Entries entries = gather_pairs(table.cells, _mm512_cvttps_epi32(position));
  Located located{entries.second, _mm512_castsi512_ps(entries.first)};
  uint32_t crowded = _mm512_movepi32_mask(located.index);
  const __mmask16 right = _mm512_cmp_ps_mask(x, located.breakpoint, _CMP_GE_OQ);
  located.index = _mm512_mask_add_epi32(located.index, right, located.index, _mm512_set1_epi32(1));
  if (crowded) {
    alignas(64) float value[kLanes], breakpoint[kLanes];
    alignas(64) uint32_t index[kLanes], cell_entry[kLanes];
    _mm512_store_ps(value, x);
    _mm512_store_ps(breakpoint, located.breakpoint);
    _mm512_store_si512(index, located.index);
    _mm512_store_si512(cell_entry, entries.second);
    for (; crowded; crowded &= crowded - 1) {
      const int lane = __builtin_ctz(crowded);
      const Found found = search_cell(table, cell_entry[lane], value[lane]);
      index[lane] = found.index;
      breakpoint[lane] = found.breakpoint;
    }
    located.index = _mm512_load_si512(index);
    located.breakpoint = _mm512_load_ps(breakpoint);
  }
  return located;
}

static inline void bin_lanes(const float* values, const CellTable& table, FixedPointScale fixed, BinSums* sums) {
  const Floats x = load(values);
  const Located located = locate(table, x);
  alignas(64) uint32_t index[kLanes];
  alignas(64) __m128i added[kLanes];
  _mm512_store_si512(index, located.index);
  const __m512i one = _mm512_set1_epi64(1);
  for (int half = 0; half < 2; ++half) {
    const __m256 value = half ? _mm512_extractf32x8_ps(x, 1) : _mm512_castps512_ps256(x);
    const __m256 left = half ? _mm512_extractf32x8_ps(located.breakpoint, 1) : _mm512_castps512_ps256(located.breakpoint);
    __m512d distance = _mm512_abs_pd(_mm512_sub_pd(_mm512_cvtps_pd(value), _mm512_cvtps_pd(left)));
    distance = _mm512_mul_pd(distance, _mm512_set1_pd(fixed.scale));
    distance = _mm512_min_pd(_mm512_max_pd(distance, _mm512_setzero_pd()), _mm512_set1_pd(fixed.most));
    const __m512i offset = _mm512_cvttpd_epi64(distance);
    // Pairs {1, offset}; unpacking leaves lanes in the order 0 2 4 6 and 1 3 5 7.
    _mm512_store_si512(added + 8 * half, _mm512_unpacklo_epi64(one, offset));
    _mm512_store_si512(added + 8 * half + 4, _mm512_unpackhi_epi64(one, offset));
  }
  for (int i = 0; i < kLanes; ++i) {
    constexpr int lane_of[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    __m128i* bin = reinterpret_cast<__m128i*>(sums + index[(i & 8) + lane_of[i & 7]]);
    _mm_store_si128(bin, _mm_add_epi64(_mm_load_si128(bin), added[i]));
  }
}

static inline Floats gradient_lanes(Floats x, const CellTable& table, Floats highest, const Line<float>* lines) {
  const Located located = locate(table, x);
  const Entries line = gather_pairs(lines, located.index);
  // min returns its second operand where x is NaN.
  const Floats offset = _mm512_sub_ps(_mm512_min_ps(highest, x), located.breakpoint);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(line.second), offset, _mm512_castsi512_ps(line.first));
}

#elif RSL_ISA == 256

constexpr int kLanes = 8;
using Floats = __m256;

static inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
static inline Floats load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline Floats load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
static inline void store(Half* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
static inline uint32_t bits_of(Floats mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }
static inline uint32_t equal(Floats a, Floats b) { return bits_of(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
static inline uint32_t not_at_most(Floats a, Floats b) { return bits_of(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
static inline uint32_t at_least(Floats a, Floats b) { return bits_of(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
static inline uint32_t not_below(Floats a, Floats b) { return bits_of(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)); }
static inline uint32_t is_nan(Floats x) { return bits_of(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
static inline Floats select(uint32_t mask, Floats x) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
  return _mm256_and_ps(x, _mm256_castsi256_ps(set));
}
static inline void compress(float* p, Floats x, uint32_t mask) {
  // The set lanes, as bytes, moved to the front by pext.
  const uint64_t bytes = _pdep_u64(mask, 0x0101010101010101u) * 0xFF;
  const uint64_t lanes = _pext_u64(0x0706050403020100u, bytes);
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes)));
  _mm256_storeu_ps(p, _mm256_permutevar8x32_ps(x, order));
}

struct Entries {
  __m256i first;
  __m256i second;
};

static inline Entries gather_pairs(const void* base, __m256i index) {
  const long long* pairs = static_cast<const long long*>(base);
  const __m256 low = _mm256_castsi256_ps(_mm256_i32gather_epi64(pairs, _mm256_castsi256_si128(index), 8));
  const __m256 high = _mm256_castsi256_ps(_mm256_i32gather_epi64(pairs, _mm256_extracti128_si256(index, 1), 8));
  // shuffle_ps works within 128-bit halves; the 64-bit permutation restores the order of lanes.
  const __m256d first = _mm256_castps_pd(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0)));
  const __m256d second = _mm256_castps_pd(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1)));
  return {_mm256_castpd_si256(_mm256_permute4x64_pd(first, _MM_SHUFFLE(3, 1, 2, 0))),
          _mm256_castpd_si256(_mm256_permute4x64_pd(second, _MM_SHUFFLE(3, 1, 2, 0)))};
}

struct Located {
  __m256i index;
  Floats breakpoint;
};

static inline Located locate(const CellTable& table, Floats x) {
  Floats position = _mm256_mul_ps(_mm256_sub_ps(x, broadcast(table.origin)), broadcast(table.scale));
  // The order of the operands sends NaN to cell 0.
  position = _mm256_min_ps(_mm256_max_ps(position, _mm256_setzero_ps()), broadcast(table.last_cell));
  const Entries entries = gather_pairs(table.cells, _mm256_cvttps_epi32(position));
  Located located{entries.second, _mm256_castsi256_ps(entries.first)};
  uint32_t crowded = bits_of(_mm256_castsi256_ps(located.index));
  const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(x, located.breakpoint, _CMP_GE_OQ));
  located.index = _mm256_sub_epi32(located.index, right);
  if (crowded) {
    alignas(32) float value[kLanes], breakpoint[kLanes];
    alignas(32) uint32_t index[kLanes], cell_entry[kLanes];
    _mm256_store_ps(value, x);
    _mm256_store_ps(breakpoint, located.breakpoint);
    _mm256_store_si256(reinterpret_cast<__m256i*>(index), located.index);
    _mm256_store_si256(reinterpret_cast<__m256i*>(cell_entry), entries.second);
    for (; crowded; crowded &= crowded - 1) {
      const int lane = __builtin_ctz(crowded);
      const Found found = search_cell(table, cell_entry[lane], value[lane]);
      index[lane] = found.index;
      breakpoint[lane] = found.breakpoint;
    }
    located.index = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
    located.breakpoint = _mm256_load_ps(breakpoint);
  }
  return located;
}

static inline void bin_lanes(const float* values, const CellTable& table, FixedPointScale fixed, BinSums* sums) {
  const Located located = locate(table, load(values));
  alignas(32) uint32_t index[kLanes];
  alignas(32) float breakpoint[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(index), located.index);
  _mm256_store_ps(breakpoint, located.breakpoint);
  for (int lane = 0; lane < kLanes; ++lane)
    bin_one(sums, index[lane], static_cast<double>(values[lane]) - static_cast<double>(breakpoint[lane]), fixed);
}

static inline Floats gradient_lanes(Floats x, const CellTable& table, Floats highest, const Line<float>* lines) {
  const Located located = locate(table, x);
  const Entries line = gather_pairs(lines, located.index);
  // min returns its second operand where x is NaN.
  const Floats offset = _mm256_sub_ps(_mm256_min_ps(highest, x), located.breakpoint);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(line.second), offset, _mm256_castsi256_ps(line.first));
}

#endif

#if RSL_ISA != 0

// bfloat16 has no rounding instruction on every processor of these sets: round half to even on the bits, NaN stays NaN.
static inline void store(BFloat16* p, Floats x) {
  alignas(64) float values[kLanes];
  store(values, x);
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = BFloat16(values[lane]);
}

template <class In>
static void scan_full_word(const In* targets, uint64_t& negatives, uint64_t& positives) {
  negatives = positives = 0;
  const Floats zero = broadcast(0);
  for (int i = 0; i < 64; i += kLanes) {
    const Floats target = load(targets + i);
    negatives |= static_cast<uint64_t>(equal(target, zero)) << i;
    positives |= static_cast<uint64_t>(not_at_most(target, zero)) << i;
  }
}

// Gathers the relevant values of many words in a buffer that stays in the first-level cache, then bins it with full vectors.
template <class In>
static void bin_full_words(const In* logits, const uint64_t* negatives, int64_t words, const CellTable& table, float first,
                           FixedPointScale fixed, BinSums* sums, int64_t& nan_count) {
  constexpr int kBuffer = 1024;
  alignas(64) float buffer[kBuffer + 64 + kLanes];
  int filled = 0;
  const Floats lowest = broadcast(first);
  for (int64_t word = 0; word < words; ++word) {
    const uint64_t mask = negatives[word];
    if (mask != 0) {
      const In* values = logits + word * 64;
      for (int i = 0; i < 64; i += kLanes) {
        const uint32_t wanted = static_cast<uint32_t>(mask >> i) & static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
        const Floats x = load(values + i);
        const uint32_t relevant = wanted & at_least(x, lowest);
        const uint32_t broken = wanted & is_nan(x);
        if (broken) nan_count += __builtin_popcount(broken);
        compress(buffer + filled, x, relevant);
        filled += __builtin_popcount(relevant);
      }
    }
    if (filled >= kBuffer || word + 1 == words) {
      int done = 0;
      for (; done + kLanes <= filled; done += kLanes) bin_lanes(buffer + done, table, fixed, sums);
      for (; done < filled; ++done) {
        const Found found = find(table, buffer[done]);
        bin_one(sums, found.index, static_cast<double>(buffer[done]) - static_cast<double>(found.breakpoint), fixed);
      }
      filled = 0;
    }
  }
}

template <class In>
static void gradient_full_word(const In* logits, uint64_t negatives, const CellTable& table, Floats first, Floats highest,
                               const Line<float>* lines, In* gradient) {
  for (int i = 0; i < 64; i += kLanes) {
    const Floats x = load(logits + i);
    const uint32_t wanted = static_cast<uint32_t>(negatives >> i) & static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
    const uint32_t relevant = wanted & not_below(x, first);
    store(gradient + i, relevant ? select(relevant, gradient_lanes(x, table, highest, lines)) : broadcast(0));
  }
}

#endif

// ---- the passes --------------------------------------------------------------------------------------------------------------

// Whether full words of In can take the vector path of this instruction set.
template <class In>
constexpr bool has_vectors() {
  return RSL_ISA != 0 && sizeof(In) <= 4;
}

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

// logits: [count]. negatives: [words of count], bits beyond count are 0. sums: [2 * slots]. Returns the number of NaN negatives.
template <class In, class Table, class T>
static int64_t bin_negatives(const In* logits, int64_t count, const uint64_t* negatives, const Table& table, T first,
                             FixedPointScale fixed, BinSums* sums) {
  int64_t nan_count = 0, word = 0;
#if RSL_ISA != 0
  if constexpr (has_vectors<In>()) {
    word = count / 64;
    bin_full_words(logits, negatives, word, table, first, fixed, sums, nan_count);
  }
#endif
  for (; word * 64 < count; ++word)
    bin_word(logits + word * 64, negatives[word], table, first, fixed, sums, nan_count);
  return nan_count;
}

// logits, gradient: [count]. negatives: [words of count]. lines: [2 * slots], upstream gradient folded in.
template <class In, class Table, class T>
static void write_gradient(const In* logits, int64_t count, const uint64_t* negatives, const Table& table, T first, T highest,
                           const Line<T>* lines, In* gradient) {
  int64_t word = 0;
#if RSL_ISA != 0
  if constexpr (has_vectors<In>()) {
    const Floats lowest = broadcast(first), top = broadcast(highest);
    for (; (word + 1) * 64 <= count; ++word)
      gradient_full_word(logits + word * 64, negatives[word], table, lowest, top, lines, gradient + word * 64);
  }
#endif
  for (; word * 64 < count; ++word) {
    const int64_t left = count - word * 64;
    gradient_word(logits + word * 64, left < 64 ? left : 64, negatives[word], table, first, highest, lines, gradient + word * 64);
  }
}
