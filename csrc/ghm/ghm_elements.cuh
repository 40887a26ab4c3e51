// The bin, loss and slope of one element on the device: in float64 as ghm.h has it, or in float32 where the logits or
// predictions and the targets are no wider.
#pragma once

#include <type_traits>

#include "ghm/ghm_stream.cuh"

namespace rsloss {

// Made on the host, so that all backends compare with the same numbers: [0] is -inf, [bins] NaN, which nothing reaches.
struct Thresholds {
  double at[kMostBins + 1];
};

// The bin of an element whose position or target is NaN.
constexpr int kNoBin = -1;

struct BinAndLoss {
  int bin;
  double loss;
};
template <class T>
struct BinAndSlope {
  int bin;
  T slope;
};

// T: float or double, in which preds and targets are at hand.
template <class T, GhmForm form>
class Elements {
 public:
  static constexpr bool kIsDouble = std::is_same_v<T, double>;
  // Of what is compared with thresholds.
  using Position = std::conditional_t<kIsDouble || form == GhmForm::kRegression, double, float>;

  // By all threads of a block. shared: [bins + 1]. Ends with a barrier.
  __device__ __forceinline__ Elements(const Thresholds& thresholds, int bins, double mu, Position* shared)
      : thresholds_(shared), bins_(bins), mu_(mu) {
    for (int k = threadIdx.x; k <= bins; k += blockDim.x) {
      shared[k] = kIsDouble || form == GhmForm::kRegression ? thresholds.at[k] : float_at_or_above(thresholds.at[k]);
    }
    __syncthreads();
    first_ = static_cast<T>(thresholds_[1]);
    inverse_mu_ = 1 / mu;
    inverse_mu_high_ = static_cast<float>(inverse_mu_);
    inverse_mu_low_ = static_cast<float>(inverse_mu_ - static_cast<double>(inverse_mu_high_));
    // Differences beyond the floats are far away too.
    far_ = static_cast<float>(fmin(1e9 * mu, 3.4e38));
  }

  __device__ __forceinline__ BinAndLoss loss(T pred, T target) const {
    if constexpr (form == GhmForm::kRegression) {
      const double d = static_cast<double>(pred) - static_cast<double>(target);
      if (isnan(d)) return {kNoBin, 0};
      const double distance = fabs(d);
      if constexpr (kIsDouble) {
        const HarmonizedElement element = regression_element(d, mu_);
        return {find(fabs(element.slope), element.position), element.loss};
      } else {
        const Distance parts = distance_of(pred, target);
        if (parts.high > far_) return {find(1, distance), distance - mu_};
        const Regression found = regression(parts.high, parts.low, inverse_mu_high_, inverse_mu_low_);
        return {find(found.slope, distance), distance * (distance * inverse_mu_) * found.factor};
      }
    } else {
      if (isnan(pred + 0 * target)) return {kNoBin, 0};  // an infinite target is as NaN
      const bool is_hard = form == GhmForm::kLabels || target == 0 || target == 1;
      const T u = target == 1 ? -pred : pred;
      if constexpr (kIsDouble) {
        const HarmonizedElement element = is_hard ? hard_element(u) : soft_element(pred, target);
        return {is_hard ? find(element.slope, u) : find_soft(element.position), element.loss};
      } else {
        const SoftPlus soft = softplus(fabsf(pred));
        const double loss = soft.value * soft.scale;
        if (is_hard) return {find_hard(u, soft.e), u > 0 ? loss + static_cast<double>(u) : loss};
        const double factor = pred > 0 ? 1 - static_cast<double>(target) : static_cast<double>(target);
        const double linear = factor == 0 ? 0 : factor * static_cast<double>(fabsf(pred));
        return {find_soft_near(pred, target, soft.e, static_cast<float>(factor)), linear + loss};
      }
    }
  }

  __device__ __forceinline__ BinAndSlope<T> slope(T pred, T target) const {
    if constexpr (form == GhmForm::kRegression) {
      const double d = static_cast<double>(pred) - static_cast<double>(target);
      if (isnan(d)) return {kNoBin, 0};
      if constexpr (kIsDouble) {
        const HarmonizedElement element = regression_element(d, mu_);
        return {find(fabs(element.slope), element.position), element.slope};
      } else {
        const float distance = static_cast<float>(fabs(d));
        const float r = distance * inverse_mu_high_;
        const float size = distance > far_ ? 1.0f : r * approximate_reciprocal_root(fmaf(r, r, 1.0f));
        return {find(size, fabs(d)), copysignf(size, static_cast<float>(d))};
      }
    } else if (form == GhmForm::kLabels || target == 0 || target == 1) {
      const T u = target == 1 ? -pred : pred;
      if (isnan(u)) return {kNoBin, 0};
      if constexpr (kIsDouble) {
        const HarmonizedElement element = hard_element(u);
        return {find(element.slope, u), target == 1 ? -element.slope : element.slope};
      } else {
        const float e = expf(-fabsf(u));
        const float size = sigmoid(u, e);
        const int bin = !(u >= first_) ? 0 : find(size, u);
        return {bin, target == 1 ? -size : size};
      }
    } else {
      if (isnan(pred + 0 * target)) return {kNoBin, 0};  // an infinite target is as NaN
      const HarmonizedElement element = soft_element(pred, target);
      return {find_soft(element.position), static_cast<T>(element.slope)};
    }
  }

 private:
  struct Distance {
    float high;
    float low;
  };

  // |pred - target| in two floats.
  static __device__ __forceinline__ Distance distance_of(float pred, float target) {
    const float high = pred - target;
    const float taken = pred - high;
    const float low = (pred - (high + taken)) + (taken - target);
    return {fabsf(high), high < 0 ? -low : low};
  }

  static __device__ __forceinline__ float sigmoid(float u, float e) {
    return (u > 0 ? 1.0f : e) * approximate_reciprocal(1 + e);
  }

  // `norm` is g to better than half a bin, which leaves one edge to ask for.
  __device__ __forceinline__ int find(T norm, Position position) const {
    const int k = nearest_edge(norm);
    return position >= thresholds_[k] ? k : k - 1;
  }

  __device__ __forceinline__ int nearest_edge(T norm) const {
    return round_product(fminf(static_cast<float>(norm), 1.0f), static_cast<float>(bins_)).integer;
  }

  __device__ __forceinline__ int find_hard(float u, float e) const {
    // Most elements are easy. A single bin has NaN here.
    return !(u >= first_) ? 0 : find(sigmoid(u, e), u);
  }

  __device__ __forceinline__ int find_soft(double norm) const {
    const int k = nearest_edge(static_cast<T>(norm));
    return k < bins_ && norm >= soft_threshold(k, bins_) ? k : k - 1;
  }

  // Only what is near an edge needs the norm in float64.
  __device__ __forceinline__ int find_soft_near(float pred, float target, float e, float factor) const {
    const float norm = fabsf(e * approximate_reciprocal(1 + e) - factor);
    const float place = fminf(norm, 1.0f) * static_cast<float>(bins_);
    const Rounded k = round_product(place, 1);
    if (k.integer == 0 || k.integer == bins_ || fabsf(place - k.value) > 0.01f) {
      return place >= k.value && k.integer < bins_ ? k.integer : (k.integer > 0 ? k.integer - 1 : 0);
    }
    return find_soft(soft_element(pred, target).position);
  }

  const Position* thresholds_;
  int bins_;
  T first_;
  double mu_;
  double inverse_mu_;
  float inverse_mu_high_;
  float inverse_mu_low_;
  float far_;
};

}  // namespace rsloss
