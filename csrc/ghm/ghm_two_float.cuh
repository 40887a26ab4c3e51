// Losses of single elements from float32 arithmetic, to 3e-8 relative: a value is the sum of two floats where a rounding would
// show, and only the last steps are float64, of which most GPUs have little. No exp or log of the library.
#pragma once

#include "common/two_float.cuh"

namespace rsloss {

__device__ __forceinline__ float approximate_reciprocal_root(float x) {
#ifdef RSL_CUDA_EMULATOR
  return 1 / sqrtf(x);
#else
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// exp(-a) and log(1 + exp(-a)) for a >= 0.
struct SoftPlus {
  float e;       // exp(-a) to a float's precision
  double value;  // log(1 + exp(-a)) is value * scale
  double scale;  // a power of two, 0 for a beyond 709
};

// With a = n log(2) + r:  exp(-a) = 2^-n m, m = exp(-r) in two floats; log(1 + e) = 2 atanh(s), s = e / (2 + e), where the
// series behind its first term is small enough for one float.
__device__ __forceinline__ SoftPlus softplus(float a) {
  // log(2) in two parts; n times the first is exact.
  constexpr float kLog2High = 0.693145751953125f;
  constexpr float kLog2Low = 1.42860677e-6f;
  const float bounded = fminf(a, 709.1f);
  const Rounded n = round_product(bounded, 1.44269504f);
  const float near = fmaf(n.value, kLog2High, -bounded);
  const float r = fmaf(n.value, kLog2Low, near);  // minus the r above, within log(2) / 2
  const float r_low = fmaf(n.value, kLog2Low, near - r);
  float series = fmaf(r, 0.00138142216f, 0.00836889911f);
  series = fmaf(r, series, 0.0416684039f);
  series = fmaf(r, series, 0.166665196f);
  series = fmaf(r, series, 0.49999994f);
  const float tail = fmaf(r * r, series, r_low);
  const float m = 1 + (r + tail);
  const float m_low = ((1 - m) + r) + tail;

  // 2^-n as a float, 0 where e is no normal float: 2 + e is 2 then.
  const float power = bits_as<float>((n.integer < 127 ? 127 - n.integer : 0) << 23);
  const float e = m * power;
  const float reciprocal = approximate_reciprocal(2 + e);
  const float quotient = m * reciprocal;
  const float s = quotient * power;
  // m - 2 quotient is exact, as they differ by less than a factor of two.
  const float rest = fmaf(-quotient, e, fmaf(-2.0f, quotient, m)) + fmaf(-s, m_low, m_low);
  const float squared = s * s;
  const float low = fmaf(rest, 2 * reciprocal, quotient * squared * atanh_terms(squared));
  return {e, static_cast<double>(2 * quotient) + static_cast<double>(low),
          bits_as<double>(static_cast<uint64_t>(1023 - n.integer) << 52)};
}

// With the distance |d| = r mu: 1 / (1 + sqrt(1 + r^2)), by which the loss is |d| r times this, and the slope |d| / sqrt(...).
struct Regression {
  double factor;
  float slope;
};

// distance + distance_low = |d|, inverse_mu + inverse_mu_low = 1 / mu; r at most about 1e9.
__device__ __forceinline__ Regression regression(float distance, float distance_low, float inverse_mu, float inverse_mu_low) {
  const float r = distance * inverse_mu;
  const float r_low = fmaf(distance, inverse_mu, -r) + fmaf(distance, inverse_mu_low, distance_low * inverse_mu);
  const float square = r * r;
  const float square_low = fmaf(r, r, -square) + 2 * r * r_low;
  const float sum = 1 + square;
  const float one = sum - square;
  const float sum_low = ((1 - one) + (square - (sum - one))) + square_low;
  const float reciprocal_root = approximate_reciprocal_root(sum);
  const float root = sum * reciprocal_root;
  const float root_low = 0.5f * reciprocal_root * (fmaf(-root, root, sum) + sum_low);
  const float divisor = 1 + root;
  const float divisor_low = (1 - (divisor - root)) + root_low;
  const float factor = approximate_reciprocal(divisor);
  const float factor_low = factor * fmaf(-factor, divisor_low, fmaf(-factor, divisor, 1.0f));
  return {static_cast<double>(factor) + static_cast<double>(factor_low), r * reciprocal_root};
}

}  // namespace rsloss
