// Exponentials and logarithms on the vectors of vectors_simd.h, for the bodies that common/for_each_isa.h compiles: e^u as a
// pair of floats for sums that must be right to 1e-8, as one float for gradients, and in double.

// Beyond it e^-|u| may leave the normal range of float.
constexpr float kLargestFloatExponent = 86;

// A sum that is right to 4e-9 before it is rounded; `low` is below 3 % of it.
struct FloatPair {
  FloatVec high;
  FloatVec low;
};

// 2^(j/16), in the bits less j of the sixteenths of an octave that the exponent of e^u adds; and what is lost in rounding it.
alignas(64) constexpr float kSixteenths[16] = {0x1p+0f,        0x1.fb5586p-1f, 0x1.f72b84p-1f, 0x1.f387a6p-1f,
                                               0x1.f06fep-1f,  0x1.edea64p-1f, 0x1.ebfdaep-1f, 0x1.eab07ep-1f,
                                               0x1.ea09e6p-1f, 0x1.ea1148p-1f, 0x1.eace54p-1f, 0x1.ec4918p-1f,
                                               0x1.ee89fap-1f, 0x1.f199bep-1f, 0x1.f5818ep-1f, 0x1.fa4afap-1f};
alignas(64) constexpr float kLostOfSixteenths[16] = {0,          4.629e-8f,  -1.199e-8f, 4.73e-8f,   3.193e-8f, 3.621e-8f,
                                                     -3.099e-8f, -7.475e-9f, 1.711e-8f,  -3.048e-8f, 5.233e-9f, 6.108e-9f,
                                                     -1.472e-8f, -5.259e-9f, -6.128e-9f, 5.141e-9f};
constexpr int kSixteenthsVectors = RSL_ISA == 0 ? 0 : 16 / kFloats;

// 2^(n/16). at: what of n indexes the table. Unsigned: of an element that the caller drops the sum may overflow.
static inline FloatVec power_of_sixteenths(const float* powers, IntVec n, IntVec at) {
  const UnsignedVec exponent = reinterpret_cast<UnsignedVec>(n) << 19;
  return reinterpret_cast<FloatVec>(reinterpret_cast<UnsignedVec>(look_up<kSixteenthsVectors>(powers, at)) + exponent);
}
static inline IntVec index_of_sixteenths(IntVec n) { return RSL_ISA == 0 ? n & 15 : n; }

// e^u for u in [-86, 86] as 2^(n/16) e^r.
static inline FloatPair exp_pair(FloatVec u) {
  const FloatVec shifted = u * 23.0831207f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  // The first product and difference are exact.
  const FloatVec r = (u - n * 0x1.62ep-5f) - n * 1.99663656e-6f;
  const IntVec bits = reinterpret_cast<IntVec>(shifted), at = index_of_sixteenths(bits);
  const FloatVec high = power_of_sixteenths(kSixteenths, bits, at), lost = look_up<kSixteenthsVectors>(kLostOfSixteenths, at);
  return {high, high * (r * r * (0.166670248f * r + 0.500016212f) + (r + lost))};
}

// x - n * factor, rounded once where there is an instruction for it.
static inline FloatVec minus_product(FloatVec x, FloatVec n, FloatVec factor) {
#if RSL_ISA == 512
  return _mm512_fnmadd_ps(n, factor, x);
#elif RSL_ISA == 256
  return _mm256_fnmadd_ps(n, factor, x);
#else
  return x - n * factor;
#endif
}

// log 2 / 16 as split_exponent splits with it. Where a product is rounded once with the sum the float serves, wrong by 3e-9 of
// itself, which is of the exponent.
constexpr float kSixteenthOfLog2 = 0x1.62e43p-5f;

// u as a multiple of log 2 / 16 and r; `power`: 2 to the multiple, but for what the table loses.
struct SplitExponent {
  FloatVec r;
  FloatVec power;
  IntVec at;
};

// magic: 3 * 2^22, less a multiple that u's is to be relative to. powers: the table, or a multiple of it.
static inline SplitExponent split_exponent(FloatVec u, float magic, const float* powers) {
  const FloatVec shifted = u * 23.0831207f + magic, n = shifted - magic;
  // Without such an operation in two parts, of which the first product and difference are exact.
  const FloatVec r =
      RSL_ISA == 0 ? (u - n * 0x1.62ep-5f) - n * 1.99663656e-6f : minus_product(u, n, all_floats(kSixteenthOfLog2));
  const IntVec bits = reinterpret_cast<IntVec>(shifted), at = index_of_sixteenths(bits);
  return {r, power_of_sixteenths(powers, bits, at), at};
}
static inline SplitExponent split_exponent(FloatVec u, float magic) { return split_exponent(u, magic, kSixteenths); }

// e^u for u in [-86, 86], right to 5e-7: enough for a gradient.
static inline FloatVec exp_of(FloatVec u) {
  const SplitExponent split = split_exponent(u, 0x1.8p23f);
  return (split.power * split.r) * ((0.166670248f * split.r + 0.500016212f) * split.r + 1) + split.power;
}

// The low bits of a float to which 0x1.8p23 was added are an integer: an index into a table of kSize floats.
template <int kSize>
static inline FloatVec look_up_by_bits(const float* table, FloatVec at) {
  const IntVec bits = reinterpret_cast<IntVec>(at);
  return look_up<RSL_ISA == 0 ? 0 : kSize / kFloats>(table, RSL_ISA == 0 ? bits & (kSize - 1) : bits);
}

constexpr float float_of_bits(int32_t bits) {
  float value = static_cast<float>((bits & 0x7fffff) | 0x800000) / 0x1p23f;
  for (int exponent = (bits >> 23) - 127; exponent > 0; --exponent) value *= 2;
  for (int exponent = (bits >> 23) - 127; exponent < 0; ++exponent) value /= 2;
  return value;
}
// 2^(j / parts) for 0 <= j < parts.
constexpr double part_of_octave(int j, int parts) {
  const double x = j * (0.69314718055994531 / parts);
  double sum = 0, term = 1;
  for (int k = 1; k < 40; ++k) sum += term, term *= x / k;
  return sum;
}

// 2^(j / kGradientParts), in the bits less j of the parts of an octave that the exponent adds.
constexpr int kGradientParts = RSL_ISA == 256 ? 8 : 32;
constexpr int kGradientPartBits = RSL_ISA == 256 ? 20 : 18;  // of a float, below a part of an octave
struct OctaveParts {
  alignas(64) float values[kGradientParts];
};
constexpr OctaveParts make_octave_parts() {
  OctaveParts table{};
  for (int j = 0; j < kGradientParts; ++j) {
    const int mantissa = static_cast<int>((part_of_octave(j, kGradientParts) - 1) * 0x1p23 + 0.5);
    table.values[j] = float_of_bits((127 << 23) + mantissa - (j << kGradientPartBits));
  }
  return table;
}
constexpr OctaveParts kOctaveParts = make_octave_parts();

// e^-x for x in [0, 86], right to 2e-7 near 0 and 4e-7 at the end: enough for a gradient. Beyond it any number.
static inline FloatVec exp_minus(FloatVec x) {
  constexpr float kPart = 0x1.62e43p-1f / kGradientParts, kExactPart = 0x1.62ep-1f / kGradientParts,
                  kLostPart = 3.19461848e-5f / kGradientParts;
  const FloatVec shifted = x * (-1 / kPart) + 0x1.8p23f, n = shifted - 0x1.8p23f;
  // As split_exponent splits.
  const FloatVec r = RSL_ISA == 0 ? (x + n * kExactPart) + n * kLostPart : minus_product(x, n, all_floats(-kPart));
  const UnsignedVec part = reinterpret_cast<UnsignedVec>(look_up_by_bits<kGradientParts>(kOctaveParts.values, shifted));
  // Unsigned: beyond the range the sum may overflow.
  const FloatVec power = reinterpret_cast<FloatVec>(part + (reinterpret_cast<UnsignedVec>(shifted) << kGradientPartBits));
  // Of e^-r to the first power that |r| below log 2 / 2 parts leaves to see.
  const FloatVec curve = kGradientParts == 8 ? (0.5000647f - r * 0.16666667f) * r - 1 : r * 0.5f - 1.0000147f;
  // No product here is below the normal range, that with the power only where it is rounded once with the sum.
  return RSL_ISA == 0 ? power * (r * curve + 1) : power * (r * curve) + power;
}

// e^-x for x >= 0 or NaN. As the square of e^(-x/2), which cannot leave the normal range before the result does.
static inline DoubleVec exp_minus(DoubleVec x) {
  const DoubleVec half = (x > 1400.0 ? all_doubles(1400) : x) * -0.5;
  const DoubleVec magic = all_doubles(0x1.8p52);
  const DoubleVec shifted = half * 1.44269504088896340736 + magic, n = shifted - magic;
  const DoubleVec r = half - n * 0x1.62e42feep-1 - n * 0x1.a39ef35793c76p-33;
  DoubleVec sum = all_doubles(1 / 479001600.0);
  const double coefficients[] = {1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0, 1 / 5040.0, 1 / 720.0,
                                 1 / 120.0,      1 / 24.0,      1 / 6.0,      0.5,         1.0,        1.0};
  for (const double coefficient : coefficients) sum = sum * r + coefficient;
  // Unsigned: of NaN the sum may overflow.
  const UnsignedLongVec power =
      (reinterpret_cast<UnsignedLongVec>(shifted) << 52) + reinterpret_cast<UnsignedLongVec>(all_doubles(1));
  const DoubleVec root = sum * reinterpret_cast<DoubleVec>(power);
  return root * root;
}

// log(1 + r) for r >= 0, finite or not, or NaN; of others any number. log(1 + r) = n log 2 + log(f) with f within [0.7, 1.42],
// and the latter by the series of 2 artanh((f - 1) / (f + 1)). For n = 0 f - 1 is r itself, however small.
static inline DoubleVec log_one_plus_any(DoubleVec r) {
  const DoubleVec sum = 1 + r;
  // The exponent of sum / sqrt(1/2) (rounded down). Unsigned: of a sum below 0 the difference may
  // overflow.
  const UnsignedLongVec bits = reinterpret_cast<UnsignedLongVec>(sum), shifted = bits - 0x3fe6a09e667f3bcd;
  const LongVec exponent = reinterpret_cast<LongVec>(shifted) >> 52;
  const DoubleVec f = reinterpret_cast<DoubleVec>(bits - (reinterpret_cast<UnsignedLongVec>(exponent) << 52));
  const DoubleVec x = exponent == 0 ? r : f - 1, s = x / (2 + x), square = s * s;
  DoubleVec series = all_doubles(1 / 23.0);
  for (int k = 21; k >= 3; k -= 2) series = series * square + 1.0 / k;
  // Exact for exponents: the integer in the low bits of a large double.
  const DoubleVec magic = all_doubles(0x1.8p52);
  const DoubleVec n = reinterpret_cast<DoubleVec>(exponent + reinterpret_cast<LongVec>(magic)) - magic;
  const DoubleVec value = n * 0x1.62e42fefa39efp-1 + 2 * (s + s * (square * series));
  return r < 0x1p1000 ? value : r;
}

// log(1 + e) for e in [0, 1], right to 2e-7: enough for a gradient.
static inline FloatVec log_one_plus(FloatVec e) {
  const float coefficients[] = {-0.029504957f, 0.07822549f, -0.13663207f, 0.19105989f,
                                -0.24842978f,  0.33319095f, -0.49999493f, 0.99999994f};
  FloatVec sum = all_floats(0.005232624f);
  for (const float coefficient : coefficients) sum = sum * e + coefficient;
  return e * sum;
}

// In double by tables in registers. kExact: to about 1e-13; else to 2e-9 and 5e-10, which single elements of a float's
// precision need. 2^(j/16), in the bits less j of the sixteenths of an octave that the exponent adds.
alignas(64) constexpr double kDoubleSixteenths[16] = {
    0x1.0000000000000p+0, 0x1.fb5586cf9890fp-1, 0x1.f72b83c7d517bp-1, 0x1.f387a6e756238p-1,
    0x1.f06fe0a31b715p-1, 0x1.edea64c123422p-1, 0x1.ebfdad5362a27p-1, 0x1.eab07dd485429p-1,
    0x1.ea09e667f3bcdp-1, 0x1.ea11473eb0187p-1, 0x1.eace5422aa0dbp-1, 0x1.ec49182a3f090p-1,
    0x1.ee89f995ad3adp-1, 0x1.f199bdd85529cp-1, 0x1.f5818dcfba487p-1, 0x1.fa4afa2a490dap-1};
// Of 1 + k / 15.49, rounded: the inverse, and minus its logarithm.
alignas(64) constexpr double kInverses[16] = {0x1p+0,     0x1.e10p-1, 0x1.c58p-1, 0x1.acep-1, 0x1.96ep-1, 0x1.830p-1,
                                              0x1.710p-1, 0x1.60ap-1, 0x1.51ap-1, 0x1.43ep-1, 0x1.372p-1, 0x1.2b6p-1,
                                              0x1.208p-1, 0x1.166p-1, 0x1.0cep-1, 0x1.042p-1};
alignas(64) constexpr double kLogarithms[16] = {0x0.0p+0,
                                                0x1.ffa6911ab9301p-5,
                                                0x1.f0f70cdd992e3p-4,
                                                0x1.6ad267195d4aep-3,
                                                0x1.d6ab23f70d290p-3,
                                                0x1.1e9e1678899f4p-2,
                                                0x1.4f637ebba9810p-2,
                                                0x1.7dde9909647b8p-2,
                                                0x1.aa61d437c3220p-2,
                                                0x1.d4f54c30c5a2cp-2,
                                                0x1.fe15c15234ee3p-2,
                                                0x1.12c0dc38cf06dp-1,
                                                0x1.25b2c55cd5762p-1,
                                                0x1.37fd71aba763cp-1,
                                                0x1.49c498b5da63fp-1,
                                                0x1.5ab505b39040bp-1};

// e^-x for x in [-700, 708].
template <bool kExact>
static inline DoubleVec exp_minus_by_table(DoubleVec x) {
  const DoubleVec magic = all_doubles(0x1.8p52);
  const DoubleVec shifted = x * -23.08312065422341 + magic, n = shifted - magic;
  const DoubleVec r = -x - n * 0x1.62e42fefa39efp-5, square = r * r;
  const LongVec at = reinterpret_cast<LongVec>(shifted);
  // Unsigned: of an element that the caller drops the sum may overflow.
  const UnsignedLongVec exponent = reinterpret_cast<UnsignedLongVec>(shifted) << 48;
  const DoubleVec power = look_up_sixteen(kDoubleSixteenths, at);
  const DoubleVec scale = reinterpret_cast<DoubleVec>(reinterpret_cast<UnsignedLongVec>(power) + exponent);
  if constexpr (!kExact) return scale + scale * (r + square * (0.500016194862918 + r * 0.16667024768842953));
  DoubleVec sum = r * (1 / 720.0) + 1 / 120.0;
  sum = (sum * r + 1 / 24.0) * r + 1 / 6.0;
  return scale + scale * (r + square * (sum * r + 0.5));
}

// log(1 + e) for e in [0, 1].
template <bool kExact>
static inline DoubleVec log_one_plus_by_table(DoubleVec e) {
  const LongVec at = reinterpret_cast<LongVec>(e * 15.49 + all_doubles(0x1.8p52));
  const DoubleVec inverse = look_up_sixteen(kInverses, at), d = e * inverse + (inverse - 1), square = d * d;
  if constexpr (!kExact) {
    const DoubleVec high = d * 0.20023969570682243 - 0.2502168268277533;
    const DoubleVec low = d * 0.33333323798431447 - 0.49999994376315593;
    return look_up_sixteen(kLogarithms, at) + (d + square * (square * high + low));
  }
  DoubleVec sum = all_doubles(-1 / 10.0);
  for (int k = 9; k >= 2; --k) sum = sum * d + (k % 2 ? 1.0 : -1.0) / k;
  return look_up_sixteen(kLogarithms, at) + (d + square * sum);
}
