// Elements in vectors: the formulas of focal.h. Part of focal_simd.h.

// Not yet multiplied by any weight. kSlope false: the slope is not used.
struct ElementDoubles {
  DoubleVec loss;
  DoubleVec slope;
};

// e^-|x|, and what follows from it. Beyond 708 it is 0.
struct SigmoidDoubles {
  DoubleVec near;  // |x|, 708 at most, also for NaN
  DoubleVec e;
  DoubleVec larger;  // of sigma(x) and 1 - sigma(x)
  DoubleVec smaller;
  DoubleVec log_part;  // log(1 + e)
};

constexpr double kFarthest = 708;

template <bool kExact>
static inline SigmoidDoubles sigmoid_doubles(DoubleVec x) {
  const DoubleVec distance = absolute(x), farthest = all_doubles(kFarthest);
  const DoubleVec near = distance < farthest ? distance : farthest;
  const DoubleVec e = distance > farthest ? DoubleVec{} : exp_minus_by_table<kExact>(near);
  const DoubleVec larger = reciprocal(1 + e);
  return {near, e, larger, e * larger, log_one_plus_by_table<kExact>(e)};
}

// A target of 0 (x = z) or 1 (x = -z, and the slope to be negated), kGamma -1: any gamma.
template <int kGamma, bool kExact>
static inline ElementDoubles hard_doubles(DoubleVec x, DoubleVec gamma) {
  const SigmoidDoubles sigmoid = sigmoid_doubles<kExact>(x);
  const LongVec is_above = x > 0.0;
  const DoubleVec q = is_above ? sigmoid.larger : sigmoid.smaller, rest = is_above ? sigmoid.smaller : sigmoid.larger;
  // NaN passes through.
  const DoubleVec softplus = (0.0 > x ? DoubleVec{} : x) + sigmoid.log_part;
  DoubleVec m = all_doubles(1);
  if constexpr (kGamma == 0) gamma = DoubleVec{};
  if constexpr (kGamma == 1) gamma = m, m = q;
  if constexpr (kGamma == 2) gamma = all_doubles(2), m = q * q;
  if constexpr (kGamma < 0) {
    const DoubleVec exponent = gamma * ((is_above ? DoubleVec{} : sigmoid.near) + sigmoid.log_part);
    const DoubleVec power = exp_minus_by_table<kExact>(exponent < kFarthest ? exponent : all_doubles(kFarthest));
    m = exponent > kFarthest ? DoubleVec{} : power;
  }
  // `rest` is 0 where softplus is above a thousand.
  const DoubleVec finite = softplus > 1e3 ? all_doubles(1e3) : softplus;
  return {m * softplus, m * (gamma * rest * finite + q)};
}

// log(x) for x within [1e-300, 2).
static inline DoubleVec log_of_double(DoubleVec x) {
  const LongVec bits = reinterpret_cast<LongVec>(x), one = reinterpret_cast<LongVec>(all_doubles(1));
  const LongVec exponent = (bits >> 52) - 1023;
  const DoubleVec mantissa = reinterpret_cast<DoubleVec>((bits & 0xfffffffffffff) | one);
  const DoubleVec magic = all_doubles(0x1.8p52);
  const DoubleVec n = reinterpret_cast<DoubleVec>(exponent + reinterpret_cast<LongVec>(magic)) - magic;
  return n * 0x1.62e42fefa39efp-1 + log_one_plus_by_table<true>(mantissa - 1);
}

// base^gamma for a base within [0, 2), 0^0 = 1.
static inline DoubleVec power_doubles(DoubleVec base, DoubleVec gamma) {
  constexpr double kSmallest = 1e-300;
  const DoubleVec exponent = -gamma * log_of_double(base > kSmallest ? base : all_doubles(kSmallest));
  const DoubleVec bounded = exponent < kFarthest ? exponent : all_doubles(kFarthest);
  const DoubleVec power = exp_minus_by_table<true>(bounded > -kFarthest ? bounded : all_doubles(-kFarthest));
  const LongVec is_zero = (base < kSmallest) | (exponent > kFarthest);
  return gamma == 0.0 ? all_doubles(1) : is_zero ? DoubleVec{} : power;
}

// Any target; the weights of the class are multiplied in.
static inline ElementDoubles soft_doubles(FocalModulator modulator, DoubleVec z, DoubleVec t, DoubleVec gamma,
                                          DoubleVec positive, DoubleVec negative) {
  const SigmoidDoubles sigmoid = sigmoid_doubles<true>(z);
  const LongVec is_above = z > 0.0;
  const DoubleVec factor = is_above ? 1 - t : t, other = is_above ? t : 1 - t, none = DoubleVec{};
  // Only one whose factor is 0 stays finite at an infinite logit.
  const DoubleVec entropy = (factor == 0.0 ? none : factor * absolute(z)) + sigmoid.log_part;
  const DoubleVec error = is_above ? factor - sigmoid.smaller : sigmoid.smaller - factor;  // p - t
  const DoubleVec spread = sigmoid.larger * sigmoid.smaller;
  DoubleVec w = t > 0.0 ? positive : negative, base, base_slope;
  if (modulator == kFocal) {
    w = positive * t + negative * (1 - t);
    base = sigmoid.larger * factor + sigmoid.smaller * other;
    base_slope = spread * (1 - 2 * t);
  } else if (modulator == kQuality) {
    base = absolute(error);
    base_slope = error > 0.0 ? spread : -spread;
  } else {
    base = is_above ? sigmoid.larger : sigmoid.smaller;
    base_slope = spread;
    gamma = t > 0.0 ? none : gamma;
    if (modulator == kVarifocal) w = t > 0.0 ? positive * t : w;
  }
  const DoubleVec m = power_doubles(base, gamma), weighted = w * m;
  const LongVec has_rate = (base > 0.0) & (base_slope != 0.0);
  const DoubleVec finite = entropy > 1e300 ? all_doubles(1e300) : entropy;
  const DoubleVec rate = gamma * (m / (has_rate ? base : all_doubles(1))) * base_slope * finite;
  const DoubleVec slope = w * ((has_rate ? rate : none) + m * error), loss = weighted == 0.0 ? none : weighted * entropy;
  const LongVec is_number = entropy == entropy;
  return {is_number ? loss : entropy, is_number ? slope : entropy};
}

// dL/dx of a target of 0 or 1 in floats, for |x| = distance within [0, 86]; right to 1e-6 of it. positive: the lanes with x >
// 0.
template <int kGamma>
static inline FloatVec hard_slope(FloatVec distance, uint32_t positive, FloatVec gamma_high, FloatVec gamma_low) {
  const FloatVec e = exp_minus(distance), larger = reciprocal(1 + e), smaller = e * larger, none = FloatVec{};
  const FloatVec q = choose(positive, larger, smaller);
  if constexpr (kGamma == 0) return q;
  const FloatVec rest = choose(positive, smaller, larger), log_part = log_one_plus(e);
  const FloatVec softplus = choose(positive, distance, none) + log_part;
  if constexpr (kGamma == 1) return q * (rest * softplus + q);
  if constexpr (kGamma == 2) return q * q * (2 * rest * softplus + q);
  // gamma softplus(-x) as the sum of two floats: what is lost by rounding it would show.
  const FloatVec below = choose(positive, none, distance), product = gamma_high * below;
  const FloatVec other = gamma_high * log_part + (product_error(gamma_high, below, product) + gamma_low * below);
  const FloatVec sum = product + other, part = sum - product, lost = (product - (sum - part)) + (other - part);
  const FloatVec limit = all_floats(kLargestFloatExponent);
  const uint32_t is_near = at_most_mask(sum, limit);
  const FloatVec power = exp_minus(choose(is_near, sum, limit));
  const FloatVec m = choose(is_near, power - power * lost, none);
  return m * (gamma_high * rest * softplus + q);
}
