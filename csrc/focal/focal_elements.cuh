// The loss and the slope of one element with a target of 0 or 1 from float32 arithmetic: the loss in two floats, which together
// are right to better than 1e-8, the slope in one. What that cannot hold is computed in float64 by focal.h.
#pragma once

#include "common/two_float.cuh"
#include "focal/focal.h"

namespace rsloss {

// gamma of all classes of a block, where all have the same: 0, 1 or 2 are powers, which are cheaper.
constexpr int kAnyPower = 3;

// A loss is added up where it is within these bounds; beyond, parts of it are not normal floats, or may not be.
constexpr float kSmallestLoss = 1e-30f;
constexpr float kLargestLoss = 1e30f;

// What a class means for its positives or its negatives. weight NaN: no normal float holds it.
struct alignas(16) HardClass {
  TwoFloat gamma;
  TwoFloat weight;
};

__device__ __forceinline__ HardClass hard_class(double gamma, double weight) {
  const bool is_held = weight == 0 || (fabs(weight) >= 1e-30 && fabs(weight) <= 1e30);
  return {two_float(gamma), is_held ? two_float(weight) : TwoFloat{NAN, NAN}};
}

class FocalElements {
 public:
  __device__ __forceinline__ FocalElements(const ExponentialTable& exponentials, int power)
      : exponentials_(exponentials), power_(power) {}

  // Without the weight of the class. x: the logit, or minus the logit of a positive.
  __device__ __forceinline__ TwoFloat loss(float x, TwoFloat gamma) const {
    const TwoFloat e = exp_of_minus_absolute(x);
    const TwoFloat log_part = log1p_of(e);
    const TwoFloat softplus = sum_of(fmaxf(x, 0.0f), log_part);
    if (power_ == 0) return softplus;
    if (power_ == kAnyPower) return product_of(any_power(x, log_part, gamma), softplus);
    const TwoFloat larger = reciprocal_of_one_plus(e);
    const TwoFloat q = product_of(x > 0 ? TwoFloat{1, 0} : e, larger);
    const TwoFloat loss = product_of(q, softplus);
    return power_ == 1 ? loss : product_of(q, loss);
  }

  // As above, without the weight of the class.
  __device__ __forceinline__ float slope(float x, TwoFloat gamma) const {
    if (power_ == kAnyPower) {
      const TwoFloat e = exp_of_minus_absolute(x);
      const TwoFloat log_part = log1p_of(e);
      const float m = any_power(x, log_part, gamma).high;
      if (fabsf(x) <= kLargestExponent) return slope_of(x, e.high, log_part.high, gamma.high, m);
      // Beside 0, not beside 1.
      const float tiny = expf(-fabsf(x));
      return slope_of(x, tiny, tiny, gamma.high, m);
    }
    const float e = expf(-fabsf(x));
    const float s = e * approximate_reciprocal(2 + e);
    const float squared = s * s;
    return slope_of(x, e, s * fmaf(squared, atanh_terms(squared), 2.0f), static_cast<float>(power_), 1);
  }

 private:
  static constexpr float kLargestExponent = 80;

  // exp(-|x|); beyond the largest exponent any number that is as small beside 1.
  __device__ __forceinline__ TwoFloat exp_of_minus_absolute(float x) const {
    return exponentials_.exp_of_minus(fminf(fabsf(x), kLargestExponent));
  }

  // exp(-gamma softplus(-x)); 0 where no float is normal.
  __device__ __forceinline__ TwoFloat any_power(float x, TwoFloat log_part, TwoFloat gamma) const {
    const TwoFloat exponent = product_of(gamma, sum_of(fmaxf(-x, 0.0f), log_part));
    if (!(exponent.high < 87)) return {0, 0};
    return exponentials_.exp_of_minus(exponent.high, exponent.low);
  }

  // m: what is left of the modulator where it is not q or its square.
  __device__ __forceinline__ float slope_of(float x, float e, float log_part, float gamma, float m) const {
    const float larger = approximate_reciprocal(1 + e);
    const float smaller = e * larger;
    const bool is_above = x > 0;
    const float q = is_above ? larger : smaller;
    const float rest = is_above ? smaller : larger;
    const float softplus = fmaxf(x, 0.0f) + log_part;
    if (power_ == 1) m = q;
    if (power_ == 2) m = q * q;
    return m * fmaf(gamma * rest, softplus, q);
  }

  const ExponentialTable& exponentials_;
  int power_;
};

}  // namespace rsloss
