// Exponentials e^(x - shift) with |x| at most 86 and x - shift within [-86, 0.03], where `shift` is the multiple of log 2 / 16
// that is nearest to a number m (kept apart: e^(shift - m), in double). x - m itself, rounded to a float, would be wrong by as
// much as an exponential of it must not be.
#include "common/exponentials_simd.h"

struct ExponentShift {
  float magic;       // x * 16 / log 2 + magic has x's multiple, less m's, in its lowest bits
  double remainder;  // shift - m, within 0.022 of 0
};

static inline ExponentShift shift_near(float m) {
  const float multiple = (m * 23.0831207f + 0x1.8p23f) - 0x1.8p23f;
  return {0x1.8p23f - multiple, static_cast<double>(multiple) * 0x1.62e42fefa39efp-5 - static_cast<double>(m)};
}

// x as a multiple of log 2 / 16 and r; `power`: 2 to the multiple less that of the shift, but for what the table loses.
struct SplitExponent {
  FloatVec r;
  FloatVec power;
  IntVec at;
};
static inline SplitExponent split_exponent(FloatVec x, float magic) {
  const FloatVec shifted = x * 23.0831207f + magic, n = shifted - magic;
  // The first product and difference are exact.
  const FloatVec r = (x - n * 0x1.62ep-5f) - n * 1.99663656e-6f;
  const IntVec bits = reinterpret_cast<IntVec>(shifted), at = RSL_ISA == 0 ? bits & 15 : bits;
  // Unsigned: of an element that the caller drops the sum may overflow.
  const UnsignedVec power =
      reinterpret_cast<UnsignedVec>(look_up<kSixteenthsVectors>(kSixteenths, at)) + (reinterpret_cast<UnsignedVec>(bits) << 19);
  return {r, reinterpret_cast<FloatVec>(power), at};
}

// As a sum that is right to 4e-9; `low` is below 3 % of it.
static inline FloatPair exp_pair(FloatVec x, float magic) {
  const SplitExponent split = split_exponent(x, magic);
  const FloatVec r = split.r, lost = look_up<kSixteenthsVectors>(kLostOfSixteenths, split.at);
  return {split.power, split.power * (r * r * (0.166670248f * r + 0.500016212f) + (r + lost))};
}

// Right to 2e-7.
static inline FloatVec exp_float(FloatVec x, float magic) {
  const SplitExponent split = split_exponent(x, magic);
  const FloatVec r = split.r;
  return split.power + split.power * (r * r * (0.166670248f * r + 0.500016212f) + r);
}

// e^x for |x| at most 0.03.
static inline DoubleVec exp_of_remainder(DoubleVec x) {
  DoubleVec sum = all_doubles(1 / 5040.0);
  const double coefficients[] = {1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 0.5, 1.0, 1.0};
  for (const double coefficient : coefficients) sum = sum * x + coefficient;
  return sum;
}
