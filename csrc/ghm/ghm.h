// The mathematics of gradient harmonizing, for host and device: bin thresholds, loss and slope of one element, density.
// Derivation and tensor layouts: rsloss_kernels/losses/ghm/README.md.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace rsloss {

constexpr int kMostBins = 256;
enum HistogramRow { kBinCount = 0, kBinLoss = 1, kHistogramRows = 2 };

// The bin of an element is the number of k in 1..bins-1 whose threshold is at or below its `position`, which orders elements as
// g does: u for targets 0 and 1 (hard), g itself for other targets (soft), |d| for regression.
RSL_HOST_DEVICE double hard_threshold(int k, int bins) {
  return 2 * k > bins ? log1p(static_cast<double>(2 * k - bins) / (bins - k)) : -log1p(static_cast<double>(bins - 2 * k) / k);
}
RSL_HOST_DEVICE double soft_threshold(int k, int bins) { return static_cast<double>(k) / bins; }
RSL_HOST_DEVICE double regression_threshold(int k, int bins, double mu) {
  return mu * k / sqrt(static_cast<double>((bins - k) * (bins + k)));
}

// Smallest float at or above a threshold: comparing a float with it decides as comparing with the threshold does.
RSL_HOST_DEVICE float float_at_or_above(double threshold) {
  const float nearest = static_cast<float>(threshold);
  return static_cast<double>(nearest) < threshold ? nextafterf(nearest, INFINITY) : nearest;
}

// What an element contributes: its loss, the derivative by its logit or prediction, and its position among the thresholds.
struct HarmonizedElement {
  double loss;
  double slope;
  double position;
};

// Target 0: u = z. Target 1: u = -z, and the caller negates the slope.
RSL_HOST_DEVICE HarmonizedElement hard_element(double u) {
  const double e = exp(-fabs(u));
  return {(u > 0 ? u : 0) + log1p(e), (u > 0 ? 1 : e) / (1 + e), u};
}

// Any target. NaN in the logit or the target makes position and loss NaN.
RSL_HOST_DEVICE HarmonizedElement soft_element(double z, double t) {
  const double e = exp(-fabs(z)), factor = z > 0 ? 1 - t : t;
  const double slope = e / (1 + e) - factor;
  return {(factor == 0 ? 0 : factor * fabs(z)) + log1p(e), z > 0 ? -slope : slope, fabs(slope)};
}

// d = prediction - target, both in float64 before. Beyond 1e9 mu the root is |d| to the last bit, and d^2 may overflow.
RSL_HOST_DEVICE HarmonizedElement regression_element(double d, double mu) {
  const double distance = fabs(d);
  if (distance > 1e9 * mu) return {distance - mu, d > 0 ? 1.0 : -1.0, distance};
  const double root = sqrt(d * d + mu * mu);
  return {distance * (distance / (root + mu)), d / root, distance};
}

// The running count of one bin.
struct BinDensity {
  double acc_sum;
  int64_t num_updates;
  double density;
};

// `count` valid elements in this call. `corrects_bias`: num_updates is there, and the density corrected by it.
RSL_HOST_DEVICE BinDensity update_density(double count, double acc_sum, int64_t num_updates, double momentum,
                                          bool count_empty_bins, bool corrects_bias) {
  if (momentum == 0) return {count, num_updates, count};
  if (count > 0 || count_empty_bins) {
    acc_sum = momentum * acc_sum + (1 - momentum) * count;
    num_updates += 1;
  }
  const double share = corrects_bias ? -expm1(static_cast<double>(num_updates) * log(momentum)) : 1;
  return {acc_sum, num_updates, acc_sum / share};
}

// w_b. bins_in_use: how many bins hold an element, or all of them.
RSL_HOST_DEVICE double bin_weight(double count, double density, double bins_in_use) {
  return count > 0 ? 1 / (density * bins_in_use) : 0;
}

}  // namespace rsloss
