// Arithmetic in float32 whose results are right to more than a float: a value is the sum of two floats where a rounding would
// show. No float64, of which most GPUs have little, and no exp or log of the library.
#pragma once

#include <cstring>

#include "common/cuda_launch.h"

namespace rsloss {

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// To about one unit in the last place; every use either corrects it or needs no more.
__device__ __forceinline__ float approximate_reciprocal(float x) {
#ifdef RSL_CUDA_EMULATOR
  return 1 / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// round(x * factor), |x * factor| below 2^22: the last bits of a sum with 1.5 * 2^23.
constexpr float kRound = 12582912.0f;
struct Rounded {
  float value;
  int integer;
};
__device__ __forceinline__ Rounded round_product(float x, float factor) {
  const float sum = fmaf(x, factor, kRound);
  return {sum - kRound, bits_as<int>(sum) - bits_as<int>(kRound)};
}

// high + low, |low| small beside |high|.
struct TwoFloat {
  float high;
  float low;
};

__device__ __forceinline__ TwoFloat two_float(double x) {
  const float high = static_cast<float>(x);
  return {high, static_cast<float>(x - static_cast<double>(high))};
}

__device__ __forceinline__ double value_of(TwoFloat x) { return static_cast<double>(x.high) + static_cast<double>(x.low); }

// |low| at most half a unit of high's last place, |high| above |low| before.
__device__ __forceinline__ TwoFloat normalized(TwoFloat x) {
  const float high = x.high + x.low;
  return {high, x.low - (high - x.high)};
}

// Whatever their order of size.
__device__ __forceinline__ TwoFloat sum_of(float a, TwoFloat b) {
  const float high = a + b.high;
  const float from_b = high - a;
  return {high, (a - (high - from_b)) + (b.high - from_b) + b.low};
}
__device__ __forceinline__ TwoFloat sum_of(TwoFloat a, TwoFloat b) {
  const TwoFloat sum = sum_of(a.high, b);
  return {sum.high, sum.low + a.low};
}

__device__ __forceinline__ TwoFloat product_of(TwoFloat a, TwoFloat b) {
  const float high = a.high * b.high;
  return {high, fmaf(a.low, b.high, fmaf(a.high, b.low, fmaf(a.high, b.high, -high)))};
}

// A sum in two floats.
class CompensatedSum {
 public:
  __device__ __forceinline__ void add(TwoFloat x) {
    const TwoFloat sum = sum_of(sum_.high, x);
    sum_ = {sum.high, sum_.low + sum.low};
  }
  __device__ __forceinline__ double value() const { return value_of(sum_); }

 private:
  TwoFloat sum_ = {0, 0};
};

// exp(-a) by a table of 2^(-j / 32), which leaves an exponent of at most 0.011, for 0 <= a <= 87: right to 1.5e-9. At the lower
// end low is no normal number.
class ExponentialTable {
 public:
  static constexpr int kEntries = 32;

  // By all threads of a block, of at least kEntries; entries: shared, [kEntries]. A barrier must follow.
  __device__ __forceinline__ explicit ExponentialTable(TwoFloat* entries) : entries_(entries) {
    if (threadIdx.x < kEntries) {
      const TwoFloat entry = two_float(exp2(-static_cast<double>(threadIdx.x) / kEntries));
      entries[threadIdx.x] = {entry.high, entry.low / entry.high};
    }
  }

  __device__ __forceinline__ TwoFloat exp_of_minus(float a, float a_low = 0) const {
    // log(2) / 32 in two parts; the first has 12 bits, so that n times it is exact.
    constexpr float kStepHigh = 0.0216598510742187500f;
    constexpr float kStepLow = 9.9831821e-07f;
    const Rounded n = round_product(a, 46.1662413f);
    const float r = fmaf(n.value, kStepLow, fmaf(n.value, kStepHigh, -a)) - a_low;
    const TwoFloat entry = entries_[n.integer & (kEntries - 1)];
    const float scaled = bits_as<float>(bits_as<int>(entry.high) - ((n.integer >> 5) << 23));
    // exp(r) - 1 and the rest of the entry, relative.
    const float growth = fmaf(r * r, fmaf(r, 0.166666672f, 0.5f), r) + entry.low;
    const float high = fmaf(scaled, growth, scaled);
    return {high, fmaf(scaled, growth, scaled - high)};
  }

 private:
  const TwoFloat* entries_;
};

// 2 atanh(s) / s = 2 + s^2 atanh_terms(s^2), |s| at most 1/3, but for 1e-9.
__device__ __forceinline__ float atanh_terms(float squared) {
  float terms = fmaf(squared, 0.243009463f, 0.214276537f);
  terms = fmaf(squared, terms, 0.286168844f);
  terms = fmaf(squared, terms, 0.399988770f);
  return fmaf(squared, terms, 0.666666746f);
}

// log(1 + e) = log(1 + c) + 2 atanh(s), s = (e - c) / (2 + c + e), c = 1/2 or 0, for e within [0, 1]: right to 1.5e-9.
__device__ __forceinline__ TwoFloat log1p_of(TwoFloat e) {
  const bool is_large = e.high > 0.25f;
  const TwoFloat first = is_large ? TwoFloat{0.405465096f, 1.18728891e-08f} : TwoFloat{0, 0};
  const float base = is_large ? 2.5f : 2.0f;
  // Exact.
  const float numerator = e.high - (base - 2);
  const float divisor = base + e.high;
  const float divisor_low = e.high - (divisor - base) + e.low;
  const float reciprocal = approximate_reciprocal(divisor);
  const float s = numerator * reciprocal;
  const float rest = fmaf(-s, divisor_low, fmaf(-s, divisor, numerator)) + e.low;
  const float squared = s * s;
  const float terms = fmaf(squared, fmaf(squared, 0.295243680f, 0.399875015f), 0.666667163f);
  const float high = first.high + 2 * s;
  const float low = (2 * s - (high - first.high)) + first.low;
  return normalized({high, fmaf(2 * reciprocal, rest, fmaf(s * squared, terms, low))});
}

// 1 / (1 + e)
__device__ __forceinline__ TwoFloat reciprocal_of_one_plus(TwoFloat e) {
  const float sum = 1 + e.high;
  const float sum_low = ((1 - sum) + e.high) + e.low;
  const float reciprocal = approximate_reciprocal(sum);
  return {reciprocal, reciprocal * fmaf(-reciprocal, sum_low, fmaf(-reciprocal, sum, 1.0f))};
}

}  // namespace rsloss
