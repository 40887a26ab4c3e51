// Vectors of floats and doubles for the bodies of the streaming passes, compiled once per instruction set
// (common/for_each_isa.h). Arithmetic and comparisons are the compiler's own on vector types; here is what it cannot say: loads
// that widen, stores that narrow, bit masks, table look-ups. Bit i of a mask is lane i.

#if RSL_ISA == 512
constexpr int kFloats = 16;
#elif RSL_ISA == 256
constexpr int kFloats = 8;
#else
constexpr int kFloats = 4;
#endif
constexpr int kDoubles = kFloats / 2;
constexpr uint32_t kAllFloats = (1u << kFloats) - 1;
constexpr uint32_t kAllDoubles = (1u << kDoubles) - 1;

typedef float FloatVec __attribute__((vector_size(4 * kFloats)));
typedef int32_t IntVec __attribute__((vector_size(4 * kFloats)));
typedef uint32_t UnsignedVec __attribute__((vector_size(4 * kFloats)));
typedef float HalfFloatVec __attribute__((vector_size(2 * kFloats)));
typedef double DoubleVec __attribute__((vector_size(8 * kDoubles)));
typedef int64_t LongVec __attribute__((vector_size(8 * kDoubles)));
typedef uint64_t UnsignedLongVec __attribute__((vector_size(8 * kDoubles)));

template <class Vec, class T>
static inline Vec load_vec(const T* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class Vec, class T>
static inline void store_vec(T* p, Vec x) {
  __builtin_memcpy(p, &x, sizeof x);
}
static inline FloatVec all_floats(float x) { return x - FloatVec{}; }
static inline DoubleVec all_doubles(double x) { return x - DoubleVec{}; }

static inline FloatVec load_floats(const float* p) { return load_vec<FloatVec>(p); }
static inline void store_floats(float* p, FloatVec x) { store_vec(p, x); }

#if RSL_ISA == 512

static inline FloatVec load_floats(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline FloatVec load_floats(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline void store_floats(Half* p, FloatVec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline uint32_t mask_of(IntVec comparison) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(comparison)); }
static inline uint32_t equal_mask(FloatVec a, FloatVec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
static inline uint32_t greater_mask(FloatVec a, FloatVec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline uint32_t at_most_mask(FloatVec a, FloatVec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
static inline uint32_t at_most_mask(UnsignedVec a, UnsignedVec b) {
  return _mm512_cmple_epu32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
}
static inline FloatVec negate_where(uint32_t mask, FloatVec x) {
  return _mm512_mask_xor_ps(x, static_cast<__mmask16>(mask), x, _mm512_set1_ps(-0.0f));
}
static inline FloatVec choose(uint32_t mask, FloatVec yes, FloatVec no) {
  return _mm512_mask_mov_ps(no, static_cast<__mmask16>(mask), yes);
}
static inline IntVec choose(uint32_t mask, IntVec yes, IntVec no) {
  return reinterpret_cast<IntVec>(
      _mm512_mask_mov_epi32(reinterpret_cast<__m512i>(no), static_cast<__mmask16>(mask), reinterpret_cast<__m512i>(yes)));
}
static inline IntVec add_one_where(uint32_t mask, IntVec x) {
  const __m512i bits = reinterpret_cast<__m512i>(x);
  return reinterpret_cast<IntVec>(_mm512_mask_add_epi32(bits, static_cast<__mmask16>(mask), bits, _mm512_set1_epi32(1)));
}
// 1 / x and 1 / sqrt(x) to 14 bits, 1 for 1. Intel's processors and AMD's gave the same bits (tests/output_hashes.py), as those
// of AVX2's estimates are not: there they are divided.
static inline FloatVec reciprocal_estimate(FloatVec x) { return _mm512_rcp14_ps(x); }
static inline FloatVec reciprocal_root_estimate(FloatVec x) { return _mm512_rsqrt14_ps(x); }
static inline uint32_t zero_mask(IntVec x) {
  return _mm512_testn_epi32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(x));
}
static inline uint32_t negative_mask(IntVec x) { return _mm512_movepi32_mask(reinterpret_cast<__m512i>(x)); }
// Writes the lanes of the mask, which come first, and a whole vector. Returns how many they are. In a register: a compressing
// store is slow on some processors.
static inline int store_picked(uint32_t mask, FloatVec x, float* p) {
  store_vec(p, FloatVec(_mm512_maskz_compress_ps(static_cast<__mmask16>(mask), x)));
  return __builtin_popcount(mask);
}
static inline IntVec truncate(FloatVec x) { return reinterpret_cast<IntVec>(_mm512_cvttps_epi32(x)); }
static inline DoubleVec low_doubles(FloatVec x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
static inline DoubleVec high_doubles(FloatVec x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

// A table of kVectors times 16 floats in registers, or of any size in memory for 0.
template <int kVectors>
static inline FloatVec look_up(const float* table, IntVec at) {
  const __m512i index = reinterpret_cast<__m512i>(at);
  const auto part = [table](int i) { return _mm512_loadu_ps(table + 16 * i); };
  if constexpr (kVectors == 1) return _mm512_permutexvar_ps(index, part(0));
  if constexpr (kVectors == 2) return _mm512_permutex2var_ps(part(0), index, part(1));
  if constexpr (kVectors == 4) {
    const __mmask16 is_upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
    return _mm512_mask_mov_ps(_mm512_permutex2var_ps(part(0), index, part(1)), is_upper,
                              _mm512_permutex2var_ps(part(2), index, part(3)));
  }
  return _mm512_i32gather_ps(index, table, 4);
}
static inline DoubleVec square_root(DoubleVec x) { return _mm512_sqrt_pd(x); }
static inline uint32_t at_most_mask(DoubleVec a, DoubleVec b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
static inline uint32_t greater_mask(DoubleVec a, DoubleVec b) { return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ); }
static inline DoubleVec choose(uint32_t mask, DoubleVec yes, DoubleVec no) {
  return _mm512_mask_mov_pd(no, static_cast<__mmask8>(mask), yes);
}
// 1 / x to 40 bits at least, and to 27, for 1 <= x <= 2.
static inline DoubleVec reciprocal(DoubleVec x) {
  const DoubleVec estimate = _mm512_rcp14_pd(x), error = 1 - x * estimate;
  return estimate + estimate * (error * error + error);
}
static inline DoubleVec rough_reciprocal(DoubleVec x) {
  const DoubleVec estimate = _mm512_rcp14_pd(x);
  return estimate + estimate * (1 - x * estimate);
}
// A table of 16 doubles, by the low four bits.
static inline DoubleVec look_up_sixteen(const double* table, LongVec at) {
  return _mm512_permutex2var_pd(_mm512_load_pd(table), reinterpret_cast<__m512i>(at), _mm512_load_pd(table + 8));
}
static inline FloatVec to_floats(DoubleVec low, DoubleVec high) {
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}
// a * b - product, exactly, where product is a * b rounded.
static inline FloatVec product_error(FloatVec a, FloatVec b, FloatVec product) { return _mm512_fmsub_ps(a, b, product); }

#elif RSL_ISA == 256

static inline FloatVec load_floats(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline FloatVec load_floats(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline void store_floats(Half* p, FloatVec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
static inline uint32_t mask_of(IntVec comparison) {
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(comparison)));
}
static inline uint32_t equal_mask(FloatVec a, FloatVec b) { return mask_of(a == b); }
static inline uint32_t greater_mask(FloatVec a, FloatVec b) { return mask_of(a > b); }
static inline uint32_t at_most_mask(FloatVec a, FloatVec b) { return mask_of(a <= b); }
static inline IntVec lanes_of(uint32_t mask) {
  const IntVec bit = {1, 2, 4, 8, 16, 32, 64, 128};
  return (static_cast<int32_t>(mask) & bit) == bit;
}
static inline FloatVec reciprocal_estimate(FloatVec x) { return 1 / x; }
static inline FloatVec reciprocal_root_estimate(FloatVec x) { return 1 / FloatVec(_mm256_sqrt_ps(x)); }
static inline IntVec truncate(FloatVec x) { return reinterpret_cast<IntVec>(_mm256_cvttps_epi32(x)); }
static inline DoubleVec low_doubles(FloatVec x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
static inline DoubleVec high_doubles(FloatVec x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

// A table of kVectors times 8 floats in registers, or of any size in memory for 0.
template <int kVectors>
static inline FloatVec look_up(const float* table, IntVec at) {
  const __m256i index = reinterpret_cast<__m256i>(at);
  const auto part = [&](int i) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8 * i), index); };
  // The bit of the index above those that permute, moved to the sign.
  const auto pair = [&](int i) {
    return _mm256_blendv_ps(part(i), part(i + 1), _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  };
  if constexpr (kVectors == 1) return part(0);
  if constexpr (kVectors == 2) return pair(0);
  if constexpr (kVectors == 4) return _mm256_blendv_ps(pair(0), pair(2), _mm256_castsi256_ps(_mm256_slli_epi32(index, 27)));
  return _mm256_i32gather_ps(table, index, 4);
}
static inline DoubleVec square_root(DoubleVec x) { return _mm256_sqrt_pd(x); }
static inline LongVec double_lanes_of(uint32_t mask) {
  const LongVec bit = {1, 2, 4, 8};
  return (static_cast<int64_t>(mask) & bit) == bit;
}
static inline DoubleVec look_up_sixteen(const double* table, LongVec at) {
  return _mm256_i64gather_pd(table, reinterpret_cast<__m256i>(at & 15), 8);
}
static inline FloatVec to_floats(DoubleVec low, DoubleVec high) {
  return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
}
static inline FloatVec product_error(FloatVec a, FloatVec b, FloatVec product) { return _mm256_fmsub_ps(a, b, product); }

#else

template <class In>
static inline FloatVec load_floats(const In* p) {
  return FloatVec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
static inline uint32_t mask_of(IntVec comparison) {
  uint32_t mask = 0;
  for (int i = 0; i < kFloats; ++i) mask |= (comparison[i] != 0 ? 1u : 0u) << i;
  return mask;
}
static inline uint32_t equal_mask(FloatVec a, FloatVec b) { return mask_of(a == b); }
static inline uint32_t greater_mask(FloatVec a, FloatVec b) { return mask_of(a > b); }
static inline uint32_t at_most_mask(FloatVec a, FloatVec b) { return mask_of(a <= b); }
static inline IntVec lanes_of(uint32_t mask) {
  const IntVec bit = {1, 2, 4, 8};
  return (static_cast<int32_t>(mask) & bit) == bit;
}
static inline FloatVec reciprocal_estimate(FloatVec x) { return 1 / x; }
static inline FloatVec reciprocal_root_estimate(FloatVec x) {
  FloatVec root;
  for (int i = 0; i < kFloats; ++i) root[i] = __builtin_sqrtf(x[i]);
  return 1 / root;
}
static inline IntVec truncate(FloatVec x) { return __builtin_convertvector(x, IntVec); }
static inline DoubleVec low_doubles(FloatVec x) { return DoubleVec{x[0], x[1]}; }
static inline DoubleVec high_doubles(FloatVec x) { return DoubleVec{x[2], x[3]}; }
template <int kVectors>
static inline FloatVec look_up(const float* table, IntVec at) {
  return FloatVec{table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
}
static inline DoubleVec square_root(DoubleVec x) { return DoubleVec{__builtin_sqrt(x[0]), __builtin_sqrt(x[1])}; }
static inline LongVec double_lanes_of(uint32_t mask) {
  const LongVec bit = {1, 2};
  return (static_cast<int64_t>(mask) & bit) == bit;
}
static inline DoubleVec look_up_sixteen(const double* table, LongVec at) {
  return DoubleVec{table[at[0] & 15], table[at[1] & 15]};
}
static inline FloatVec to_floats(DoubleVec low, DoubleVec high) {
  return FloatVec{static_cast<float>(low[0]), static_cast<float>(low[1]), static_cast<float>(high[0]),
                  static_cast<float>(high[1])};
}
static inline FloatVec product_error(FloatVec a, FloatVec b, FloatVec product) {
  return to_floats(low_doubles(a) * low_doubles(b) - low_doubles(product),
                   high_doubles(a) * high_doubles(b) - high_doubles(product));
}

#endif

#if RSL_ISA != 512

static inline uint32_t at_most_mask(UnsignedVec a, UnsignedVec b) { return mask_of(reinterpret_cast<IntVec>(a <= b)); }
static inline uint32_t zero_mask(IntVec x) { return mask_of(x == 0); }
static inline uint32_t negative_mask(IntVec x) { return mask_of(x >> 31); }
static inline int store_picked(uint32_t mask, FloatVec x, float* p) {
  int count = 0;
  for (; mask != 0; mask &= mask - 1) p[count++] = x[__builtin_ctz(mask)];
  return count;
}
static inline FloatVec choose(uint32_t mask, FloatVec yes, FloatVec no) { return lanes_of(mask) ? yes : no; }
static inline IntVec choose(uint32_t mask, IntVec yes, IntVec no) { return lanes_of(mask) ? yes : no; }
static inline FloatVec negate_where(uint32_t mask, FloatVec x) { return choose(mask, -x, x); }
static inline uint32_t mask_of(LongVec comparison) {
  uint32_t mask = 0;
  for (int i = 0; i < kDoubles; ++i) mask |= (comparison[i] != 0 ? 1u : 0u) << i;
  return mask;
}
static inline uint32_t at_most_mask(DoubleVec a, DoubleVec b) { return mask_of(a <= b); }
static inline uint32_t greater_mask(DoubleVec a, DoubleVec b) { return mask_of(a > b); }
static inline DoubleVec choose(uint32_t mask, DoubleVec yes, DoubleVec no) { return double_lanes_of(mask) ? yes : no; }
static inline DoubleVec reciprocal(DoubleVec x) { return 1 / x; }
static inline DoubleVec rough_reciprocal(DoubleVec x) { return 1 / x; }
static inline IntVec add_one_where(uint32_t mask, IntVec x) { return x - lanes_of(mask); }

#endif

// bfloat16 has no rounding instruction on every processor of these sets: round half to even on the bits, NaN stays NaN.
#if RSL_ISA == 512

static inline void store_floats(BFloat16* p, FloatVec x) {
  const __m512i bits = reinterpret_cast<__m512i>(x);
  const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  // What arithmetic gave as NaN has a bit of the upper half set; nothing is added to it.
  const __mmask16 is_number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  const __m512i rounded = _mm512_mask_add_epi32(bits, is_number, _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

#elif RSL_ISA == 256

static inline void store_floats(BFloat16* p, FloatVec x) {
  typedef int16_t ShortVec __attribute__((vector_size(2 * kFloats)));
  // Unsigned: of NaN the sum may overflow.
  const UnsignedVec bits = reinterpret_cast<UnsignedVec>(x), rounded = (bits + ((bits >> 16) & 1) + 0x7fff) >> 16;
  const IntVec halves = reinterpret_cast<IntVec>(rounded);
  store_vec(p, __builtin_convertvector(x == x ? halves : halves * 0 + 0x7fc0, ShortVec));
}

#endif

// Where there is no instruction: lane by lane, which rounds as the scalar conversion does.
template <class Out>
static inline void store_floats(Out* p, FloatVec x) {
  for (int i = 0; i < kFloats; ++i) p[i] = Out(x[i]);
}

// Calls body with the number of vectors for look_up into a table of `size` floats, as a type. Tables have room for whole
// vectors.
template <int kVectors>
struct TableVectors {
  static constexpr int value = kVectors;
};
template <class Body>
static inline void with_table_vectors(int size, const Body& body) {
  if (RSL_ISA == 0 || size > 4 * kFloats) body(TableVectors<0>{});
  else if (size <= kFloats) body(TableVectors<1>{});
  else if (size <= 2 * kFloats) body(TableVectors<2>{});
  else body(TableVectors<4>{});
}

// 1 / x to about the precision of a division.
static inline FloatVec reciprocal(FloatVec x) {
  const FloatVec estimate = reciprocal_estimate(x);
  return RSL_ISA == 512 ? estimate * (2 - x * estimate) : estimate;
}

static inline FloatVec absolute(FloatVec x) { return reinterpret_cast<FloatVec>(reinterpret_cast<IntVec>(x) & 0x7fffffff); }
static inline DoubleVec absolute(DoubleVec x) {
  return reinterpret_cast<DoubleVec>(reinterpret_cast<LongVec>(x) & 0x7fffffffffffffff);
}

// As many elements as a vector of floats has, in double.
struct DoublePair {
  DoubleVec low;
  DoubleVec high;
};
static inline DoublePair widen_floats(FloatVec x) { return {low_doubles(x), high_doubles(x)}; }
template <class In>
static inline DoublePair load_doubles(const In* p) {
  return widen_floats(load_floats(p));
}
#if RSL_ISA == 512
// As they are read, which costs half of what widening a register does.
static inline DoublePair load_doubles(const float* p) {
  return {_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + kDoubles))};
}
#endif
static inline DoublePair load_doubles(const double* p) { return {load_vec<DoubleVec>(p), load_vec<DoubleVec>(p + kDoubles)}; }
static inline void store_doubles(double* p, DoublePair x) {
  store_vec(p, x.low);
  store_vec(p + kDoubles, x.high);
}

static inline double sum_lanes(DoubleVec x) {
#if RSL_ISA == 512
  return _mm512_reduce_add_pd(x);
#else
  double sum = 0;
  for (int lane = 0; lane < kDoubles; ++lane) sum += x[lane];
  return sum;
#endif
}

// Calls body(i, the elements from i on) for `count` elements in steps of a vector; behind the last one are zeros.
template <class In, class Body>
static inline void for_vectors(const In* data, int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kFloats <= count; i += kFloats) body(i, load_floats(data + i));
  if (i == count) return;
  In lanes[kFloats] = {};
  for (int64_t lane = i; lane < count; ++lane) lanes[lane - i] = data[lane];
  body(i, load_floats(lanes));
}
