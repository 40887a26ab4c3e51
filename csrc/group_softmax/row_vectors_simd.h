// Part of a row of logits as vectors, the last of which may be incomplete; sums and the largest of their lanes.
constexpr float kFloatInfinity = __builtin_inff();
constexpr double kDoubleInfinity = __builtin_inf();

// The larger of two; the second where one is NaN.
static inline FloatVec larger_of(FloatVec a, FloatVec b) {
#if RSL_ISA == 512
  return _mm512_max_ps(a, b);
#elif RSL_ISA == 256
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// The first `count` elements; lanes behind them are -inf.
template <class In>
static inline FloatVec load_some(const In* p, int count) {
#if RSL_ISA == 512
  const __mmask16 mask = static_cast<__mmask16>(kAllFloats >> (kFloats - count));
  const FloatVec fill = all_floats(-kFloatInfinity);
  if constexpr (sizeof(In) == 4) {
    return _mm512_mask_loadu_ps(fill, mask, p);
  } else {
    In lanes[kFloats];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(mask, p));
    return choose(mask, load_floats(lanes), fill);
  }
#else
  In lanes[kFloats];
  for (int i = 0; i < kFloats; ++i) lanes[i] = In(-kFloatInfinity);
  __builtin_memcpy(lanes, p, static_cast<size_t>(count) * sizeof(In));
  return load_floats(lanes);
#endif
}

template <class Out>
static inline void store_some(Out* p, FloatVec x, int count) {
#if RSL_ISA == 512
  const __mmask16 mask = static_cast<__mmask16>(kAllFloats >> (kFloats - count));
  if constexpr (sizeof(Out) == 4) {
    _mm512_mask_storeu_ps(p, mask, x);
  } else {
    Out lanes[kFloats];
    store_floats(lanes, x);
    _mm256_mask_storeu_epi16(p, mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes)));
  }
#else
  Out lanes[kFloats];
  store_floats(lanes, x);
  __builtin_memcpy(p, lanes, static_cast<size_t>(count) * sizeof(Out));
#endif
}

template <class In>
static inline DoubleVec load_some_doubles(const In* p, int count) {
  DoubleVec x = all_doubles(-kDoubleInfinity);
  for (int lane = 0; lane < kDoubles; ++lane)
    if (lane < count) x[lane] = static_cast<double>(widen(p[lane]));
  return x;
}

static inline double largest_lane(DoubleVec x) {
  double largest = x[0];
  for (int lane = 1; lane < kDoubles; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
}

static inline float largest_lane(FloatVec x) {
#if RSL_ISA == 512
  return _mm512_reduce_max_ps(x);
#else
  float largest = x[0];
  for (int lane = 1; lane < kFloats; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
#endif
}

// Calls body(first element, vector of them, how many) for all.
template <class In, class Body>
static inline void for_floats(const In* data, int count, const Body& body) {
  int i = 0;
  for (; i + kFloats <= count; i += kFloats) body(i, load_floats(data + i), kFloats);
  if (i < count) body(i, load_some(data + i, count - i), count - i);
}

// Logits of a group but one. The vector that holds that one stands apart, so that loops over all run alike whichever it is,
// which branches are predicted by.
template <class In>
struct OtherLogits {
  const In* data;
  int count;
  int apart;  // the first element of the vector that stands apart; -1: none
  uint32_t skipped_of_last;
  alignas(64) In vector[kFloats];

  // skipped: -1 for none.
  OtherLogits(const In* data, int count, int skipped) : data(data), count(count), apart(-1), skipped_of_last(0) {
    const int whole = count / kFloats * kFloats;
    if (skipped >= whole) {
      skipped_of_last = 1u << (skipped - whole);
    } else if (skipped >= 0) {
      apart = skipped / kFloats * kFloats;
      const FloatVec x = load_floats(data + apart);
      store_floats(vector, choose(1u << (skipped - apart), all_floats(-kFloatInfinity), x));
    }
  }

  inline FloatVec at(int i) const { return load_floats(i == apart ? vector : data + i); }

  // -inf for the one that is left out and behind the last.
  inline FloatVec last() const {
    const int whole = count / kFloats * kFloats;
    return choose(skipped_of_last, all_floats(-kFloatInfinity), load_some(data + whole, count - whole));
  }

  // Of the first `most`, a multiple of all vectors, or of all; NaN left out.
  inline float largest_of(int most) const {
    const int end = most < count ? most : count;
    FloatVec even = all_floats(-kFloatInfinity), odd = even;
    int i = 0;
    for (; i + 2 * kFloats <= end; i += 2 * kFloats) {
      even = larger_of(at(i), even);
      odd = larger_of(at(i + kFloats), odd);
    }
    if (i + kFloats <= end) {
      even = larger_of(at(i), even);
      i += kFloats;
    }
    if (i < end) odd = larger_of(last(), odd);
    return largest_lane(larger_of(even, odd));
  }

  // Calls body(vector) for `most` vectors at most from `begin` on.
  template <class Body>
  inline void for_each(int begin, int most, const Body& body) const {
    const int left = count - begin, end = begin + (left < most * kFloats ? left : most * kFloats);
    int i = begin;
    for (; i + kFloats <= end; i += kFloats) body(at(i));
    if (i < end) body(last());
  }
};

template <class In, class Body>
static inline void for_doubles(const In* data, int count, const Body& body) {
  int i = 0;
  for (; i < count; i += kDoubles) {
    const int some = count - i < kDoubles ? count - i : kDoubles;
    if constexpr (sizeof(In) == 8) {
      if (some == kDoubles) {
        body(i, load_vec<DoubleVec>(data + i), some);
        continue;
      }
    }
    body(i, load_some_doubles(data + i, some), some);
  }
}

// a * b + c in the lanes of the mask, 0 in the others.
static inline FloatVec multiply_add_where(uint32_t mask, FloatVec a, FloatVec b, FloatVec c) {
#if RSL_ISA == 512
  return _mm512_maskz_fmadd_ps(static_cast<__mmask16>(mask), a, b, c);
#else
  return choose(mask, a * b + c, FloatVec{});
#endif
}
