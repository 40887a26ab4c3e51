// Vectors of 32-bit floats, and the grid in vector form: what the streaming passes are written in. Part of their bodies,
// compiled once per instruction set (common/for_each_isa.h).

// Inlined whatever the compiler thinks of the size: a call, and constants loaded anew, cost as much as the work.
#define RSL_INLINE static inline __attribute__((always_inline))

#if RSL_ISA != 0

// Two pairs, whose indices are read together.
RSL_INLINE __m128d load_two_pairs(const double* pairs, const int32_t* at) {
  uint64_t both;
  __builtin_memcpy(&both, at, sizeof both);
  return _mm_loadh_pd(_mm_load_sd(pairs + static_cast<uint32_t>(both)), pairs + (both >> 32));
}

RSL_INLINE __m256d load_four_pairs(const double* pairs, const int32_t* at, const int32_t* further) {
  return _mm256_insertf128_pd(_mm256_castpd128_pd256(load_two_pairs(pairs, at)), load_two_pairs(pairs, further), 1);
}

#endif

#if RSL_ISA == 512

constexpr int kLanes = 16;
using Floats = __m512;

static inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
static inline Floats load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
static inline Floats load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
static inline void store(Half* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// bfloat16 has no rounding instruction on every processor of these sets: round half to even on the bits, NaN stays NaN.
static inline void store(BFloat16* p, Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
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
// The other way round; 0 in lanes that are not set. The load stays apart: expanding from memory that was never touched, for no
// lane, takes a thousand cycles.
static inline Floats expand(const float* p, uint32_t mask) {
  Floats x = _mm512_loadu_ps(p);
  __asm__("" : "+v"(x));
  return _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), x);
}

struct Entries {
  __m512i first;   // low 32 bits of 16 gathered pairs, as floats
  __m512i second;  // high 32 bits
};

RSL_INLINE __m512 load_eight_pairs(const double* pairs, const int32_t* at) {
  const __m512d low = _mm512_castpd256_pd512(load_four_pairs(pairs, at, at + 4));
  return _mm512_castpd_ps(_mm512_insertf64x4(low, load_four_pairs(pairs, at + 8, at + 12), 1));
}

// 16 pairs of 32-bit values, two to a register: on most processors faster than the gather instructions. The indices, none of
// them negative, come from memory two at a time, and must have been written well before: a vector store does not forward to
// narrower loads at once.
RSL_INLINE Entries gather_pairs(const void* base, const int32_t* at) {
  const double* pairs = static_cast<const double*>(base);
  // Two of every four: shuffles within 128 bits bring them in order.
  const __m512 some = load_eight_pairs(pairs, at), others = load_eight_pairs(pairs, at + 2);
  return {_mm512_castps_si512(_mm512_shuffle_ps(some, others, _MM_SHUFFLE(2, 0, 2, 0))),
          _mm512_castps_si512(_mm512_shuffle_ps(some, others, _MM_SHUFFLE(3, 1, 3, 1)))};
}

RSL_INLINE Floats positions(const CellGrid& grid, Floats x) {
  const Floats position = _mm512_fmsub_ps(x, broadcast(grid.scale), broadcast(grid.origin));
  // The order of the operands sends NaN to cell 0.
  return _mm512_min_ps(_mm512_max_ps(position, _mm512_setzero_ps()), broadcast(grid.last_cell));
}

RSL_INLINE void store_cells(const CellGrid& grid, Floats x, int32_t* cells) {
  _mm512_storeu_si512(cells, _mm512_cvttps_epi32(positions(grid, x)));
}

RSL_INLINE void add_cells(const int32_t* a, const int32_t* b, int32_t* sums) {
  _mm512_storeu_si512(sums, _mm512_add_epi32(_mm512_loadu_si512(a), _mm512_loadu_si512(b)));
}

// far_offset() of 16 values, with `added` to the bits. The product is exact, so fusing it changes nothing. Offsets of crowded
// cells may be garbage.
RSL_INLINE void store_offsets(const BinPass<float>& pass, Floats x, int64_t added, int64_t* offsets) {
  const Floats bounded = _mm512_min_ps(broadcast(pass.grid.top), x);
  for (int half = 0; half < 2; ++half) {
    const __m256 value = half ? _mm512_extractf32x8_ps(bounded, 1) : _mm512_castps512_ps256(bounded);
    const __m512d shifted = _mm512_fmadd_pd(_mm512_cvtps_pd(value), _mm512_set1_pd(pass.far_scale), _mm512_set1_pd(pass.shift));
    _mm512_storeu_si512(offsets + 8 * half, _mm512_add_epi64(_mm512_castpd_si512(shifted), _mm512_set1_epi64(added)));
  }
}

// Stores the bins of 16 values, those of crowded cells wrong; returns which these are.
RSL_INLINE uint32_t store_bins(const Entries& entries, Floats x, int32_t* bins) {
  const __mmask16 right = _mm512_cmp_ps_mask(x, _mm512_castsi512_ps(entries.first), _CMP_GE_OQ);
  _mm512_storeu_si512(bins, _mm512_mask_add_epi32(entries.second, right, entries.second, _mm512_set1_epi32(1)));
  return _mm512_movepi32_mask(entries.second);
}

// The numbers from `first` on of the lanes that are set, in front.
RSL_INLINE void store_lanes(int32_t first, uint32_t mask, int32_t* lanes) {
  const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_si512(
      lanes, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_add_epi32(numbers, _mm512_set1_epi32(first))));
}

// The same by instruction. The gradient gains by it where has_fast_gathers(); binning, which does less with an entry, did not.
RSL_INLINE Entries gather_pairs(const void* base, __m512i at) {
  const __m512i low = _mm512_castpd_si512(_mm512_i32gather_pd(_mm512_castsi512_si256(at), base, 8));
  const __m512i high = _mm512_castpd_si512(_mm512_i32gather_pd(_mm512_extracti32x8_epi32(at, 1), base, 8));
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, odd, high)};
}

static inline Floats as_floats(__m512i bits) { return _mm512_castsi512_ps(bits); }
static inline Floats starts_of(const CellGrid& grid, __m512i cells) {
  return _mm512_add_ps(_mm512_cvtepi32_ps(cells), broadcast(grid.origin));
}
static inline Floats starts_of(const CellGrid& grid, const int32_t* cells) {
  return starts_of(grid, _mm512_loadu_si512(cells));
}
static inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Returns `bound` or the second argument, whichever is smaller; the second one where it is NaN.
static inline Floats at_most(Floats bound, Floats x) { return _mm512_min_ps(bound, x); }

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
static inline void store(BFloat16* p, Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(result, result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
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
// The other way round; 0 in lanes that are not set.
static inline Floats expand(const float* p, uint32_t mask) {
  const uint64_t bytes = _pdep_u64(mask, 0x0101010101010101u) * 0xFF;
  const uint64_t lanes = _pdep_u64(0x0706050403020100u, bytes);
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes)));
  return select(mask, _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), order));
}

struct Entries {
  __m256i first;
  __m256i second;
};

// 8 pairs of 32-bit values, like 16 above.
RSL_INLINE Entries gather_pairs(const void* base, const int32_t* at) {
  const double* pairs = static_cast<const double*>(base);
  const __m256 some = _mm256_castpd_ps(load_four_pairs(pairs, at, at + 4));
  const __m256 others = _mm256_castpd_ps(load_four_pairs(pairs, at + 2, at + 6));
  return {_mm256_castps_si256(_mm256_shuffle_ps(some, others, _MM_SHUFFLE(2, 0, 2, 0))),
          _mm256_castps_si256(_mm256_shuffle_ps(some, others, _MM_SHUFFLE(3, 1, 3, 1)))};
}

RSL_INLINE Floats positions(const CellGrid& grid, Floats x) {
  const Floats position = _mm256_fmsub_ps(x, broadcast(grid.scale), broadcast(grid.origin));
  // The order of the operands sends NaN to cell 0.
  return _mm256_min_ps(_mm256_max_ps(position, _mm256_setzero_ps()), broadcast(grid.last_cell));
}

RSL_INLINE void store_cells(const CellGrid& grid, Floats x, int32_t* cells) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(cells), _mm256_cvttps_epi32(positions(grid, x)));
}

RSL_INLINE void add_cells(const int32_t* a, const int32_t* b, int32_t* sums) {
  const auto load_integers = [](const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), _mm256_add_epi32(load_integers(a), load_integers(b)));
}

RSL_INLINE void store_offsets(const BinPass<float>& pass, Floats x, int64_t added, int64_t* offsets) {
  const Floats bounded = _mm256_min_ps(broadcast(pass.grid.top), x);
  for (int half = 0; half < 2; ++half) {
    const __m128 value = half ? _mm256_extractf128_ps(bounded, 1) : _mm256_castps256_ps128(bounded);
    const __m256d shifted = _mm256_fmadd_pd(_mm256_cvtps_pd(value), _mm256_set1_pd(pass.far_scale), _mm256_set1_pd(pass.shift));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(offsets + 4 * half),
                        _mm256_add_epi64(_mm256_castpd_si256(shifted), _mm256_set1_epi64x(added)));
  }
}

// Stores the bins of 8 values, those of crowded cells wrong; returns which these are.
RSL_INLINE uint32_t store_bins(const Entries& entries, Floats x, int32_t* bins) {
  const __m256i right = _mm256_castps_si256(_mm256_cmp_ps(x, _mm256_castsi256_ps(entries.first), _CMP_GE_OQ));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bins), _mm256_sub_epi32(entries.second, right));
  return bits_of(_mm256_castsi256_ps(entries.second));
}

// The numbers from `first` on of the lanes that are set, in front.
RSL_INLINE void store_lanes(int32_t first, uint32_t mask, int32_t* lanes) {
  const uint64_t bytes = _pdep_u64(mask, 0x0101010101010101u) * 0xFF;
  const __m256i order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(_pext_u64(0x0706050403020100u, bytes))));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(order, _mm256_set1_epi32(first)));
}

static inline Floats as_floats(__m256i bits) { return _mm256_castsi256_ps(bits); }
static inline Floats starts_of(const CellGrid& grid, const int32_t* cells) {
  const __m256i cell = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(cells));
  return _mm256_add_ps(_mm256_cvtepi32_ps(cell), broadcast(grid.origin));
}
static inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// Returns `bound` or the second argument, whichever is smaller; the second one where it is NaN.
static inline Floats at_most(Floats bound, Floats x) { return _mm256_min_ps(bound, x); }

#endif

#if RSL_ISA != 0

static inline void compress(int32_t* p, const int32_t* from, uint32_t mask) {
  compress(reinterpret_cast<float*>(p), load(reinterpret_cast<const float*>(from)), mask);
}

constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);

#endif

// Whether full words of In take the vector path of this instruction set.
template <class In>
constexpr bool has_vectors() {
  return RSL_ISA != 0 && sizeof(In) <= 4;
}
