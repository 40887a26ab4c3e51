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

// ---- one word ----------------------------------------------------------------------------------------------------------------

template <class In, class T>
static void bin_word(const In* logits, uint64_t negatives, const BinPass<T>& pass, int64_t& nan_count) {
  for (; negatives != 0; negatives &= negatives - 1) {
    const T value = widen(logits[__builtin_ctzll(negatives)]);
    if (value != value) ++nan_count;
    else if (value >= pass.edges[0]) bin_one(pass, value);
  }
}

template <class In, class T>
static void gradient_word(const In* logits, int64_t count, uint64_t negatives, const GradientPass<T>& pass, In* gradient) {
  for (int64_t i = 0; i < count; ++i) gradient[i] = In(negatives >> i & 1 ? gradient_one(pass, widen(logits[i])) : T(0));
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

// 16 pairs of 32-bit values, two to a register: faster than the gather instructions, which take a load a lane anyway.
static inline Entries gather_pairs(const void* base, __m512i index) {
  const double* pairs = static_cast<const double*>(base);
  alignas(64) uint32_t at[kLanes];
  _mm512_store_si512(at, index);
  const auto two = [&](int i) { return _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(pairs + at[i]), pairs + at[i + 1])); };
  __m128 first[4], second[4];
  for (int i = 0; i < 4; ++i) {
    const __m128 low = two(4 * i), high = two(4 * i + 2);
    first[i] = _mm_shuffle_ps(low, high, _MM_SHUFFLE(2, 0, 2, 0));
    second[i] = _mm_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1));
  }
  const auto join = [](const __m128* part) {
    const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(part[0]), part[1], 1);
    const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(part[2]), part[3], 1);
    return _mm512_castps_si512(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
  };
  return {join(first), join(second)};
}

static inline Floats positions(const CellGrid& grid, Floats x) {
  const Floats position = _mm512_fmsub_ps(x, broadcast(grid.scale), broadcast(grid.origin));
  // The order of the operands sends NaN to cell 0.
  return _mm512_min_ps(_mm512_max_ps(position, _mm512_setzero_ps()), broadcast(grid.last_cell));
}

// The cells of 16 values, and their offsets from the grid's origin as pairs {1, offset}.
struct BinInputs {
  alignas(64) uint32_t cell[kLanes];
  alignas(64) __m128i added[kLanes];
};

static inline void prepare_bins(const BinPass<float>& pass, const float* values, BinInputs& inputs) {
  const Floats x = load(values);
  _mm512_store_si512(inputs.cell, _mm512_cvttps_epi32(positions(pass.grid, x)));
  const __m512i one = _mm512_set1_epi64(1);
  for (int half = 0; half < 2; ++half) {
    const __m256 value = half ? _mm512_extractf32x8_ps(x, 1) : _mm512_castps512_ps256(x);
    __m512d offset = _mm512_mul_pd(_mm512_sub_pd(_mm512_cvtps_pd(value), _mm512_set1_pd(pass.origin)), _mm512_set1_pd(pass.far.scale));
    offset = _mm512_min_pd(_mm512_max_pd(offset, _mm512_setzero_pd()), _mm512_set1_pd(pass.far.most));
    const __m512i fixed = _mm512_cvttpd_epi64(offset);
    _mm512_store_si512(inputs.added + 8 * half, _mm512_unpacklo_epi64(one, fixed));
    _mm512_store_si512(inputs.added + 8 * half + 4, _mm512_unpackhi_epi64(one, fixed));
  }
}

// Where prepare_bins leaves the pair of a lane.
static constexpr int kAddedAt[kLanes] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};

static inline Floats gradient_lanes(const GradientPass<float>& pass, Floats x, uint32_t relevant) {
  const __m512i cell = _mm512_cvttps_epi32(positions(pass.grid, x));
  const Entries entries = gather_pairs(pass.cells, cell);
  const Floats value = _mm512_castsi512_ps(entries.first), slope = _mm512_castsi512_ps(entries.second);
  const Floats start = _mm512_add_ps(_mm512_cvtepi32_ps(cell), broadcast(pass.grid.origin));
  // min returns its second operand where x is NaN.
  const Floats t = _mm512_fmsub_ps(_mm512_min_ps(broadcast(pass.grid.top), x), broadcast(pass.grid.scale), start);
  const Floats result = _mm512_fmadd_ps(slope, t, value);
  uint32_t searched = relevant & is_nan(value);
  if (!searched) return result;
  alignas(64) float values[kLanes], results[kLanes];
  alignas(64) int32_t before[kLanes];
  _mm512_store_ps(values, x);
  _mm512_store_ps(results, result);
  _mm512_store_si512(before, entries.second);
  for (; searched; searched &= searched - 1) {
    const int lane = __builtin_ctz(searched);
    if (values[lane] == values[lane]) results[lane] = searched_gradient(pass, before[lane], values[lane]);
  }
  return _mm512_load_ps(results);
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

static inline Floats positions(const CellGrid& grid, Floats x) {
  const Floats position = _mm256_fmsub_ps(x, broadcast(grid.scale), broadcast(grid.origin));
  // The order of the operands sends NaN to cell 0.
  return _mm256_min_ps(_mm256_max_ps(position, _mm256_setzero_ps()), broadcast(grid.last_cell));
}

// The cells of 8 values, and their offsets from the grid's origin as pairs {1, offset}.
struct BinInputs {
  alignas(32) uint32_t cell[kLanes];
  alignas(32) __m128i added[kLanes];
};

// AVX2 converts doubles to int32 only: the high and the low part of the offset go separately, both exact.
static inline __m256i to_int64(__m256d x) {
  const __m256d high = _mm256_floor_pd(_mm256_mul_pd(x, _mm256_set1_pd(0x1p-22)));
  const __m256d low = _mm256_fnmadd_pd(high, _mm256_set1_pd(0x1p22), x);
  const __m256i high_bits = _mm256_cvtepi32_epi64(_mm256_cvttpd_epi32(high));
  return _mm256_add_epi64(_mm256_slli_epi64(high_bits, 22), _mm256_cvtepi32_epi64(_mm256_cvttpd_epi32(low)));
}

static inline void prepare_bins(const BinPass<float>& pass, const float* values, BinInputs& inputs) {
  const Floats x = load(values);
  _mm256_store_si256(reinterpret_cast<__m256i*>(inputs.cell), _mm256_cvttps_epi32(positions(pass.grid, x)));
  const __m256i one = _mm256_set1_epi64x(1);
  for (int half = 0; half < 2; ++half) {
    const __m128 value = half ? _mm256_extractf128_ps(x, 1) : _mm256_castps256_ps128(x);
    __m256d offset = _mm256_mul_pd(_mm256_sub_pd(_mm256_cvtps_pd(value), _mm256_set1_pd(pass.origin)), _mm256_set1_pd(pass.far.scale));
    offset = _mm256_min_pd(_mm256_max_pd(offset, _mm256_setzero_pd()), _mm256_set1_pd(pass.far.most));
    const __m256i fixed = to_int64(offset);
    _mm256_store_si256(reinterpret_cast<__m256i*>(inputs.added + 4 * half), _mm256_unpacklo_epi64(one, fixed));
    _mm256_store_si256(reinterpret_cast<__m256i*>(inputs.added + 4 * half + 2), _mm256_unpackhi_epi64(one, fixed));
  }
}

// Where prepare_bins leaves the pair of a lane.
static constexpr int kAddedAt[kLanes] = {0, 2, 1, 3, 4, 6, 5, 7};

static inline Floats gradient_lanes(const GradientPass<float>& pass, Floats x, uint32_t relevant) {
  const __m256i cell = _mm256_cvttps_epi32(positions(pass.grid, x));
  const Entries entries = gather_pairs(pass.cells, cell);
  const Floats value = _mm256_castsi256_ps(entries.first), slope = _mm256_castsi256_ps(entries.second);
  const Floats start = _mm256_add_ps(_mm256_cvtepi32_ps(cell), broadcast(pass.grid.origin));
  // min returns its second operand where x is NaN.
  const Floats t = _mm256_fmsub_ps(_mm256_min_ps(broadcast(pass.grid.top), x), broadcast(pass.grid.scale), start);
  const Floats result = _mm256_fmadd_ps(slope, t, value);
  uint32_t searched = relevant & is_nan(value);
  if (!searched) return result;
  alignas(32) float values[kLanes], results[kLanes];
  alignas(32) int32_t before[kLanes];
  _mm256_store_ps(values, x);
  _mm256_store_ps(results, result);
  _mm256_store_si256(reinterpret_cast<__m256i*>(before), entries.second);
  for (; searched; searched &= searched - 1) {
    const int lane = __builtin_ctz(searched);
    if (values[lane] == values[lane]) results[lane] = searched_gradient(pass, before[lane], values[lane]);
  }
  return _mm256_load_ps(results);
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

static inline void bin_lanes(const BinPass<float>& pass, const float* values) {
  BinInputs inputs;
  prepare_bins(pass, values, inputs);
  for (int lane = 0; lane < kLanes; ++lane) {
    const BinCell& cell = pass.cells[inputs.cell[lane]];
    if (__builtin_expect(cell.before & kCrowded, 0)) {
      bin_searched<float>(pass, static_cast<int32_t>(cell.before & ~kCrowded), values[lane]);
      continue;
    }
    __m128i* bin = reinterpret_cast<__m128i*>(pass.sums + cell.before + (values[lane] >= cell.breakpoint ? 1 : 0));
    _mm_store_si128(bin, _mm_add_epi64(_mm_load_si128(bin), inputs.added[kAddedAt[lane]]));
  }
}

// Gathers the relevant values of many words in a buffer that stays in the first-level cache, then bins it with full vectors.
template <class In>
static void bin_full_words(const In* logits, const uint64_t* negatives, int64_t words, const BinPass<float>& pass, int64_t& nan_count) {
  constexpr int kBuffer = 1024;
  alignas(64) float buffer[kBuffer + 64 + kLanes];
  int filled = 0;
  const Floats lowest = broadcast(pass.edges[0]);
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
      for (; done + kLanes <= filled; done += kLanes) bin_lanes(pass, buffer + done);
      for (; done < filled; ++done) bin_one(pass, buffer[done]);
      filled = 0;
    }
  }
}

template <class In>
static void gradient_full_word(const In* logits, uint64_t negatives, const GradientPass<float>& pass, In* gradient) {
  const Floats lowest = broadcast(pass.edges[0]);
  for (int i = 0; i < 64; i += kLanes) {
    const Floats x = load(logits + i);
    const uint32_t wanted = static_cast<uint32_t>(negatives >> i) & static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
    const uint32_t relevant = wanted & not_below(x, lowest);
    store(gradient + i, relevant ? select(relevant, gradient_lanes(pass, x, relevant)) : broadcast(0));
  }
}

#endif

// cells[i] = {value + step * i, step}
static void fill_line_cells(CellLine* cells, int64_t count, double value, double step) {
  for (int64_t i = 0; i < count; ++i) cells[i] = {static_cast<float>(value + step * static_cast<double>(i)), static_cast<float>(step)};
}

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

// logits: [count]. negatives: [words of count], bits beyond count are 0. Returns the number of NaN negatives.
template <class In, class T>
static int64_t bin_negatives(const In* logits, int64_t count, const uint64_t* negatives, const BinPass<T>& pass) {
  int64_t nan_count = 0, word = 0;
#if RSL_ISA != 0
  if constexpr (has_vectors<In>()) {
    word = count / 64;
    bin_full_words(logits, negatives, word, pass, nan_count);
  }
#endif
  for (; word * 64 < count; ++word) bin_word(logits + word * 64, negatives[word], pass, nan_count);
  return nan_count;
}

// logits, gradient: [count]. negatives: [words of count].
template <class In, class T>
static void write_gradient(const In* logits, int64_t count, const uint64_t* negatives, const GradientPass<T>& pass, In* gradient) {
  int64_t word = 0;
#if RSL_ISA != 0
  if constexpr (has_vectors<In>())
    for (; (word + 1) * 64 <= count; ++word)
      gradient_full_word(logits + word * 64, negatives[word], pass, gradient + word * 64);
#endif
  for (; word * 64 < count; ++word) {
    const int64_t left = count - word * 64;
    gradient_word(logits + word * 64, left < 64 ? left : 64, negatives[word], pass, gradient + word * 64);
  }
}
