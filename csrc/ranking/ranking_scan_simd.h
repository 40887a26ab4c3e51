// Dense targets -> bit masks of negatives and positives, 4 bytes read and 2 bits written per element; class indices -> bit
// masks of rows. Compiled once per instruction set (common/for_each_isa.h). Elements come in words of 64, one bit of the mask
// each: full words of 16- or 32-bit floats take the vector path; float64 and the last, partial word take the scalar one, which
// computes the same.
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

// Class c, within 0..last, has the label first + c; `first` is 0 or 1.
template <class Label>
static void scan_label_word(const Label* labels, int64_t count, Label first, Label last, uint64_t& kept, uint64_t& foreground) {
  kept = foreground = 0;
  for (int64_t i = 0; i < count; ++i) {
    kept |= uint64_t{labels[i] >= 0} << i;
    foreground |= uint64_t{labels[i] >= first && labels[i] - first <= last} << i;
  }
}

#if RSL_ISA != 0

#if RSL_ISA == 512
static inline __m512i load_labels(const void* p) { return _mm512_loadu_si512(p); }
static inline __m512i spread(int64_t x) { return _mm512_set1_epi64(x); }
static inline __m512i spread(int32_t x) { return _mm512_set1_epi32(x); }
static inline __m512i subtract(__m512i a, __m512i b, int64_t) { return _mm512_sub_epi64(a, b); }
static inline __m512i subtract(__m512i a, __m512i b, int32_t) { return _mm512_sub_epi32(a, b); }
static inline uint64_t signs(__m512i x, int64_t) { return _mm512_movepi64_mask(x); }
static inline uint64_t signs(__m512i x, int32_t) { return _mm512_movepi32_mask(x); }
static inline __m512i any_of(__m512i a, __m512i b) { return _mm512_or_si512(a, b); }
constexpr int kLabelBytes = 64;
#else
static inline __m256i load_labels(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline __m256i spread(int64_t x) { return _mm256_set1_epi64x(x); }
static inline __m256i spread(int32_t x) { return _mm256_set1_epi32(x); }
static inline __m256i subtract(__m256i a, __m256i b, int64_t) { return _mm256_sub_epi64(a, b); }
static inline __m256i subtract(__m256i a, __m256i b, int32_t) { return _mm256_sub_epi32(a, b); }
static inline uint64_t signs(__m256i x, int64_t) { return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(x))); }
static inline uint64_t signs(__m256i x, int32_t) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x))); }
static inline __m256i any_of(__m256i a, __m256i b) { return _mm256_or_si256(a, b); }
constexpr int kLabelBytes = 32;
#endif

// A label below 0, a column below 0 and one above the last one have a sign bit: differences only wrap around where the label
// has one.
template <class Label>
static void scan_full_label_word(const Label* labels, Label first, Label last, uint64_t& kept, uint64_t& foreground) {
  constexpr int lanes = kLabelBytes / sizeof(Label);
  uint64_t below_zero = 0, other = 0;
  const auto lowest = spread(first), highest = spread(last);
  for (int i = 0; i < 64; i += lanes) {
    const auto label = load_labels(labels + i), column = subtract(label, lowest, Label{});
    below_zero |= signs(label, Label{}) << i;
    other |= signs(any_of(any_of(label, column), subtract(highest, column, Label{})), Label{}) << i;
  }
  kept = ~below_zero;
  foreground = ~other;
}

#endif

// labels: [count]. kept, foreground: [words of count], rows that are not ignored and those of a class.
template <class Label>
static void scan_label_words(const Label* labels, int64_t count, Label first, Label last, uint64_t* kept,
                             uint64_t* foreground) {
  int64_t word = 0;
#if RSL_ISA != 0
  for (; (word + 1) * 64 <= count; ++word) scan_full_label_word(labels + word * 64, first, last, kept[word], foreground[word]);
#endif
  for (; word * 64 < count; ++word) {
    const int64_t left = count - word * 64;
    scan_label_word(labels + word * 64, left < 64 ? left : 64, first, last, kept[word], foreground[word]);
  }
}

static int64_t count_bits(const uint64_t* words, int64_t count) {
  int64_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits += __builtin_popcountll(words[i]);
  return bits;
}
