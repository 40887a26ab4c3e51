// Elements in vectors: the formulas of focal.h. Part of focal_simd.h.

struct ElementDoubles {
  DoubleVec loss;
  DoubleVec slope;
};

// Beyond it e^-|x| is nothing.
constexpr double kFarthest = 708;

// A target of 0 (x = z) or 1 (x = -z, and the slope to be negated), times w. near: |x|, at most kFarthest; above: the lanes
// with x > 0. kGamma -1: any gamma. kExact: to 1e-12; else the loss to 2e-8.
template <int kGamma, bool kExact>
static inline ElementDoubles hard_near(DoubleVec near, uint32_t above, DoubleVec gamma, DoubleVec w) {
  const DoubleVec e = exp_minus_by_table<kExact>(near), log_part = log_one_plus_by_table<kExact>(e);
  const DoubleVec larger = kExact ? reciprocal(1 + e) : rough_reciprocal(1 + e);
  const DoubleVec q = choose(~above & kAllDoubles, e * larger, larger), rest = choose(above, e * larger, larger);
  const DoubleVec softplus = choose(above, log_part + near, log_part);
  if constexpr (kGamma == 0) return {w * softplus, w * q};
  if constexpr (kGamma == 1) w *= q, gamma = all_doubles(1);
  if constexpr (kGamma == 2) w *= q * q, gamma = all_doubles(2);
  if constexpr (kGamma < 0) {
    const DoubleVec exponent = gamma * choose(above, log_part, log_part + near), farthest = all_doubles(kFarthest);
    w *= exp_minus_by_table<kExact>(exponent < farthest ? exponent : farthest);
  }
  return {w * softplus, w * (gamma * rest * softplus + q)};
}

// The same where |x| is larger, infinite or NaN.
static inline ElementDoubles hard_far(DoubleVec x, DoubleVec w) {
  const DoubleVec one = all_doubles(1), none = DoubleVec{};
  return {w * (0.0 > x ? none : x), w * (0.0 > x ? none : x > 0.0 ? one : x)};
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

// Any target; the weights of the class are multiplied in. A call of its own, as it is long.
[[gnu::noinline]] static ElementDoubles soft_doubles(FocalModulator modulator, DoubleVec z, DoubleVec t, DoubleVec gamma,
                                                     DoubleVec positive, DoubleVec negative) {
  const DoubleVec distance = absolute(z), farthest = all_doubles(kFarthest);
  const DoubleVec near = distance < farthest ? distance : farthest;
  const DoubleVec e = distance > farthest ? DoubleVec{} : exp_minus_by_table<true>(near);
  const DoubleVec larger = reciprocal(1 + e), smaller = e * larger;
  const LongVec is_above = z > 0.0;
  const DoubleVec factor = is_above ? 1 - t : t, other = is_above ? t : 1 - t, none = DoubleVec{};
  // Only one whose factor is 0 stays finite at an infinite logit.
  const DoubleVec entropy = (factor == 0.0 ? none : factor * distance) + log_one_plus_by_table<true>(e);
  const DoubleVec error = is_above ? factor - smaller : smaller - factor;  // p - t
  const DoubleVec spread = larger * smaller;
  DoubleVec w = t > 0.0 ? positive : negative, base, base_slope;
  if (modulator == kFocal) {
    w = positive * t + negative * (1 - t);
    base = larger * factor + smaller * other;
    base_slope = spread * (1 - 2 * t);
  } else if (modulator == kQuality) {
    base = absolute(error);
    base_slope = error > 0.0 ? spread : -spread;
  } else {
    base = is_above ? larger : smaller;
    base_slope = spread;
    gamma = t > 0.0 ? none : gamma;
    if (modulator == kVarifocal) w = t > 0.0 ? positive * t : w;
  }
  const DoubleVec m = power_doubles(base, gamma), weighted = w * m;
  const LongVec has_rate = (base > 0.0) & (base_slope != 0.0);
  const DoubleVec finite = entropy > 1e300 ? all_doubles(1e300) : entropy;
  const DoubleVec rate = gamma * (m / (has_rate ? base : all_doubles(1))) * base_slope * finite;
  const DoubleVec slope = w * ((has_rate ? rate : none) + m * error), loss = weighted == 0.0 ? none : weighted * entropy;
  // A NaN logit is lost above where the target is 0.
  const LongVec is_number = (z == z) & (t == t);
  const DoubleVec broken = z + t;
  return {is_number ? loss : broken, is_number ? slope : broken};
}
