// The mathematics of smooth L1 loss, for host and device. Derivation and tensor layouts:
// rsloss_kernels/losses/smooth_l1/README.md.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace rsloss {

constexpr double kSmallestBeta = 1e-30;
constexpr double kLargestBeta = 1e30;

// Below the smallest: 0. Out of range: NaN.
RSL_HOST_DEVICE double effective_beta(double beta) {
  if (!(beta >= 0 && beta <= kLargestBeta)) return NAN;
  return beta < kSmallestBeta ? 0 : beta;
}

// What the formulas take of beta; beta and inverse are normal floats too.
struct SmoothL1Beta {
  double beta;
  double half;
  double inverse;  // any number for beta 0, where it is not used
};

RSL_HOST_DEVICE SmoothL1Beta smooth_l1_beta(double given) {
  const double beta = effective_beta(given);
  return {beta, 0.5 * beta, beta == 0 ? 0 : 1 / beta};
}

RSL_HOST_DEVICE double smooth_l1_value(double d, const SmoothL1Beta& beta) {
  const double distance = fabs(d);
  return distance < beta.beta ? distance * (distance * (0.5 * beta.inverse)) : distance - beta.half;
}

// NaN of NaN in d; not of NaN in beta, which the caller's factor must have.
template <class T>
RSL_HOST_DEVICE T smooth_l1_slope(T d, T beta, T inverse) {
  if (fabs(d) < beta) return d * inverse;
  return d > 0 ? T(1) : d < 0 ? T(-1) : d;
}

// Of scale / normalizer times what arrives from above: NaN for a beta out of range.
RSL_HOST_DEVICE double smooth_l1_factor(double factor, const SmoothL1Beta& beta) {
  return beta.beta == beta.beta ? factor : beta.beta;
}

}  // namespace rsloss
