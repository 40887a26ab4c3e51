// Functions of e = e^z for targets of 0 at logits z <= 0, nearly all elements of a detector, in floats: what losses need as
// sums of two, right to 3e-8 (4e-8 with AVX2). Part of focal_simd.h.
//
// With e = e^z, q = e / (1 + e) and S = log1p(e) a loss q^gamma S is e^(gamma + 1) g(e), where g is smooth: log1p(e) / e / (1 +
// e)^gamma, a table of polynomials for gamma 0, 1 and 2; for any other gamma it is e^(-gamma softplus(-z)) S. e^z is kept as
// coarse (1 + rest) and g as leading (1 + ...), coarse and leading of so few bits that their products are exact in float.

constexpr double log_one_plus_constant(double x) {
  const double s = x / (2 + x);
  double power = 2 * s, sum = 0;
  for (int k = 1; k < 60; k += 2, power *= s * s) sum += power / k;
  return sum;
}

// 2^(j / kPowers) to seven bits times 2^kScale, in the bits less j of the parts of an octave that the exponent adds; and the
// logarithm of what is lost.
constexpr int kPowers = RSL_ISA == 512 ? 32 : 16;
constexpr int kPowerBits = RSL_ISA == 512 ? 18 : 19;  // of a float, below a part of an octave
struct CoarsePowers {
  alignas(64) float mantissas[kPowers];
  alignas(64) float lost[kPowers];
};
constexpr CoarsePowers make_coarse_powers(int scale) {
  CoarsePowers table{};
  for (int j = 0; j < kPowers; ++j) {
    const double exact = part_of_octave(j, kPowers);
    const int coarse = static_cast<int>(exact * 64 + 0.5);
    table.mantissas[j] = float_of_bits(((127 + scale) << 23) + ((coarse - 64) << 17) - (j << kPowerBits));
    table.lost[j] = static_cast<float>(log_one_plus_constant(exact * 64 / coarse - 1));
  }
  return table;
}
template <int kScale>
constexpr CoarsePowers kCoarsePowers = make_coarse_powers(kScale);

// Functions of e that are smooth on [0, 1], by a polynomial around each k / (kEntries - 1), in d = (kEntries - 1) e - k, within
// 1/2.
constexpr int kEntries = RSL_ISA == 512 ? 32 : RSL_ISA == 256 ? 8 : 16;
constexpr int kDegree = kEntries == 32 ? 4 : kEntries == 16 ? 5 : 7;
constexpr int kSlopeDegree = kDegree - 1;
constexpr int kSeries = 12;
struct Series {
  double terms[kSeries + 1];
};

constexpr Series over_one_plus(Series series, double center) {
  for (int k = 0; k < kSeries; ++k) series.terms[k] = (series.terms[k] - (k > 0 ? series.terms[k - 1] : 0)) / (1 + center);
  return series;
}

// The Taylor series of log1p(e) / e.
constexpr Series log_ratio_series(double center) {
  Series series{{log_one_plus_constant(center)}};
  double power = 1;
  for (int k = 1; k <= kSeries; ++k) power /= 1 + center, series.terms[k] = (k % 2 ? power : -power) / k;
  for (int k = 0; k < kSeries; ++k)
    series.terms[k] = center == 0 ? series.terms[k + 1] : (series.terms[k] - (k > 0 ? series.terms[k - 1] : 0)) / center;
  return series;
}

// As a polynomial of that degree in d, shortened where it costs least within the interval.
constexpr Series shortened(Series series, int degree) {
  double chebyshev[kSeries][kSeries] = {};  // coefficients of the polynomials
  chebyshev[0][0] = chebyshev[1][1] = 1;
  for (int n = 2; n < kSeries; ++n)
    for (int k = 0; k < kSeries; ++k) chebyshev[n][k] = (k > 0 ? 2 * chebyshev[n - 1][k - 1] : 0) - chebyshev[n - 2][k];
  double power = 1;
  for (int k = 0; k < kSeries; ++k, power *= 0.5 / (kEntries - 1)) series.terms[k] *= power;
  for (int n = kSeries - 1; n > degree; --n) {
    const double factor = series.terms[n] / chebyshev[n][n];
    for (int k = 0; k <= n; ++k) series.terms[k] -= factor * chebyshev[n][k];
  }
  power = 1;
  for (int k = 0; k <= degree; ++k, power *= 2) series.terms[k] *= power;
  return series;
}

constexpr double rounded_to_bits(double x, int bits) {
  double scale = 1;
  for (; x * scale < (1 << (bits - 1)); scale *= 2) {}
  return static_cast<int>(x * scale + 0.5) / scale;
}

// Of losses: leading (1 + terms[0] + terms[1] d + ...).
struct RatioTable {
  alignas(64) float leading[kEntries];
  alignas(64) float terms[kDegree + 1][kEntries];
};
constexpr RatioTable make_ratio_table(int gamma) {
  RatioTable table{};
  for (int i = 0; i < kEntries; ++i) {
    const double center = static_cast<double>(i) / (kEntries - 1);
    Series series = log_ratio_series(center);
    for (int times = 0; times < gamma; ++times) series = over_one_plus(series, center);
    series = shortened(series, kDegree);
    const double leading = rounded_to_bits(series.terms[0], gamma == 2 ? 3 : 10);
    table.leading[i] = static_cast<float>(leading);
    for (int k = 0; k <= kDegree; ++k) table.terms[k][i] = static_cast<float>(series.terms[k] / leading - (k == 0 ? 1 : 0));
  }
  return table;
}
template <int kGamma>
constexpr RatioTable kRatioTable = make_ratio_table(kGamma);

// Of slopes, gamma 1 and 2: (gamma log1p(e) / e + 1) / (1 + e)^(gamma + 1).
struct SlopeTable {
  alignas(64) float terms[kSlopeDegree + 1][kEntries];
};
constexpr SlopeTable make_slope_table(int gamma) {
  SlopeTable table{};
  for (int i = 0; i < kEntries; ++i) {
    const double center = static_cast<double>(i) / (kEntries - 1);
    Series series = log_ratio_series(center);
    for (int k = 0; k <= kSeries; ++k) series.terms[k] = gamma * series.terms[k] + (k == 0 ? 1 : 0);
    for (int times = 0; times <= gamma; ++times) series = over_one_plus(series, center);
    series = shortened(series, kSlopeDegree);
    for (int k = 0; k <= kSlopeDegree; ++k) table.terms[k][i] = static_cast<float>(series.terms[k]);
  }
  return table;
}
template <int kGamma>
constexpr SlopeTable kSlopeTable = make_slope_table(kGamma);

// coarse (1 + rest); coarse has seven bits.
struct CoarseFloat {
  FloatVec coarse;
  FloatVec rest;
};

// 2^kScale e^-(x + low) for x in [0, 120] where that is in the normal range.
template <int kScale>
static inline CoarseFloat exp_minus_coarse(FloatVec x, FloatVec low) {
  constexpr float kPerPower = 0.693147181f / kPowers;
  constexpr float kExactPerPower = 0x1.62ep-1f / kPowers, kLostPerPower = 3.19461848e-5f / kPowers;
  const FloatVec shifted = x * (-1 / kPerPower) + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const FloatVec lost = look_up_by_bits<kPowers>(kCoarsePowers<kScale>.lost, shifted);
  // The first product and difference are exact; without fused operations as long as n has 12 bits.
  const FloatVec r = ((n * -kExactPerPower - x) - n * kLostPerPower) + (lost - low), square = r * r;
  const FloatVec mantissa = look_up_by_bits<kPowers>(kCoarsePowers<kScale>.mantissas, shifted);
  // Unsigned: of an element that the caller drops the sum may overflow.
  const UnsignedVec power = reinterpret_cast<UnsignedVec>(mantissa) + (reinterpret_cast<UnsignedVec>(shifted) << kPowerBits);
  // Of a small r the fourth power shows in the half alone.
  const FloatVec rest = kPowers == 32 ? square * (r * 0.16666667f + 0.5000073f) + r
                                      : square * ((r * 0.16666667f + 0.5f) + square * 0.041666667f) + r;
  return {reinterpret_cast<FloatVec>(power), rest};
}

// high + low
struct FloatSum {
  FloatVec high;
  FloatVec low;
};

// e^(gamma + 1) g(e), high of 17 bits for gamma 0.
template <int kGamma>
static inline FloatSum modulated_entropy(CoarseFloat e) {
  constexpr const RatioTable& table = kRatioTable<kGamma>;
  const FloatVec steps = e.coarse * float{kEntries - 1}, shifted = (steps * e.rest + steps) + 0x1.8p23f;
  const FloatVec d = steps * e.rest + (steps - (shifted - 0x1.8p23f));
  FloatVec sum = look_up_by_bits<kEntries>(table.terms[kDegree], shifted);
  for (int k = kDegree - 1; k >= 0; --k) sum = sum * d + look_up_by_bits<kEntries>(table.terms[k], shifted);
  FloatVec high = look_up_by_bits<kEntries>(table.leading, shifted) * e.coarse, rest = e.rest;
  if constexpr (kGamma >= 1) high *= e.coarse;
  if constexpr (kGamma >= 2) high *= e.coarse;
  if constexpr (kGamma == 1) rest *= rest + 2;
  if constexpr (kGamma == 2) rest *= rest * (rest + 3) + 3;
  const FloatVec part = high * rest;
  return {high, sum * (high + part) + part};
}
