// Exponentials e^(x - shift) with |x| at most 86 and x - shift within [-86, 0.03], where `shift` is the multiple of log 2 / 16
// that is nearest to a number m (kept apart: e^(shift - m), in double). x - m itself, rounded to a float, would be wrong by as
// much as an exponential of it must not be.
#include "common/exponentials_simd.h"

// The step that split_exponent makes: that of an exponential and of the multiple near m must be the same number.
constexpr double kStep = RSL_ISA == 0 ? 0x1.62e42fefa39efp-5 : static_cast<double>(kSixteenthOfLog2);

struct ExponentShift {
  float magic;       // x * 16 / log 2 + magic has x's multiple, less m's, in its lowest bits
  double remainder;  // shift - m, within 0.022 of 0
};

static inline ExponentShift shift_near(float m) {
  const float multiple = (m * 23.0831207f + 0x1.8p23f) - 0x1.8p23f;
  return {0x1.8p23f - multiple, static_cast<double>(multiple) * kStep - static_cast<double>(m)};
}

// power + power * excess is the exponential, right to 1e-8; the excess is below 3 %.
static inline FloatVec excess_of(const SplitExponent& split) {
  const FloatVec r = split.r, lost = look_up<kSixteenthsVectors>(kLostOfSixteenths, split.at);
  return ((0.166670248f * r + 0.500016212f) * r + 1) * r + lost;
}

// Numbers that ScaledExponentials can be a multiple of.
static inline bool has_float_scale(double scale) {
  const double size = scale < 0 ? -scale : scale;
  return size >= 0x1p-36 && size <= 0x1p+100;
}

// e^(x - shift) * scale, right to 7e-7, for x - shift within [-farthest, 0.03]: there, it is a normal float.
struct ScaledExponentials {
  float magic;
  alignas(64) float powers[16];  // of the table, in the same form

  float farthest;

  ScaledExponentials(float magic, double scale) : magic(magic) {
    uint64_t bits;
    __builtin_memcpy(&bits, &scale, sizeof bits);
    const float exponents = 0.693f * static_cast<float>(static_cast<int>(bits >> 52 & 0x7ff) - 1023 + 124);
    farthest = exponents < kLargestFloatExponent ? exponents : kLargestFloatExponent;
    for (int j = 0; j < 16; j += kFloats) {
      UnsignedVec of_exponent;
      for (int lane = 0; lane < kFloats; ++lane) of_exponent[lane] = static_cast<uint32_t>(j + lane) << 19;
      const UnsignedVec power = load_vec<UnsignedVec>(kSixteenths + j) + of_exponent;
      const FloatVec scaled = reinterpret_cast<FloatVec>(power) * static_cast<float>(scale);
      store_vec(powers + j, reinterpret_cast<UnsignedVec>(scaled) - of_exponent);
    }
  }

  // 0 of what is below `least`.
  inline FloatVec operator()(FloatVec x, FloatVec least) const {
    const SplitExponent split = split_exponent(larger_of(least, x), magic, powers);
    const FloatVec r = split.r, excess = (0.50000977f * r + 1.00005865f) * r;
    return multiply_add_where(at_most_mask(least, x), split.power, excess, split.power);
  }
};

// e^x for |x| at most 0.03.
static inline DoubleVec exp_of_remainder(DoubleVec x) {
  DoubleVec sum = all_doubles(1 / 5040.0);
  const double coefficients[] = {1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5, 1.0, 1.0};
  for (const double coefficient : coefficients) sum = sum * x + coefficient;
  return sum;
}
