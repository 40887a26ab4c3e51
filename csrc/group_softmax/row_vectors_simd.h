// Part of a row of logits as vectors, the last of which may be incomplete; sums and the largest of their lanes.
constexpr float kFloatInfinity = __builtin_inff();
constexpr double kDoubleInfinity = __builtin_inf();

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

static inline double sum_lanes(DoubleVec x) {
#if RSL_ISA == 512
  return _mm512_reduce_add_pd(x);
#else
  double sum = 0;
  for (int lane = 0; lane < kDoubles; ++lane) sum += x[lane];
  return sum;
#endif
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

// The larger of two; NaN in the second stays.
static inline FloatVec at_least(FloatVec least, FloatVec x) {
#if RSL_ISA == 512
  return _mm512_max_ps(least, x);
#elif RSL_ISA == 256
  return _mm256_max_ps(least, x);
#else
  return x < least ? least : x;
#endif
}
