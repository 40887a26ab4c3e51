// Targets of 0 at logits z <= 0, nearly all elements of a detector, in floats: losses as sums of two, right to 3e-8, and slopes
// to 4e-7. Part of focal_simd.h.
//
// With e = e^z, q = e / (1 + e) and S = log1p(e) a loss q^gamma S is e^(gamma + 1) g(e), where g is smooth: log1p(e) / e / (1 +
// e)^gamma, a table of polynomials for gamma 0, 1 and 2; for any other gamma it is e^(-gamma softplus(-z)) S. e^z is kept as
// coarse (1 + rest) and g as leading (1 + ...), coarse and leading of so few bits that their products are exact in float.

// The low bits of a float to which 0x1.8p23 was added are an integer: an index into a table of a vector or, of 16, of two.
template <int kVectors>
static inline FloatVec look_up_by_bits(const float* table, FloatVec at) {
  const IntVec bits = reinterpret_cast<IntVec>(at);
  return look_up<RSL_ISA == 0 ? 0 : kVectors>(table, RSL_ISA == 0 ? bits & 15 : bits);
}

constexpr double log_one_plus_constant(double x) {
  const double s = x / (2 + x);
  double power = 2 * s, sum = 0;
  for (int k = 1; k < 60; k += 2, power *= s * s) sum += power / k;
  return sum;
}

// 2^(j/16) to seven bits times 2^kScale, in the bits less j of the sixteenths of an octave that the exponent adds; and the
// logarithm of what is lost.
struct CoarsePowers {
  alignas(64) float mantissas[16];
  alignas(64) float lost[16];
};
constexpr float float_of_bits(int32_t bits) {
  float value = static_cast<float>((bits & 0x7fffff) | 0x800000) / 0x1p23f;
  for (int exponent = (bits >> 23) - 127; exponent > 0; --exponent) value *= 2;
  for (int exponent = (bits >> 23) - 127; exponent < 0; ++exponent) value /= 2;
  return value;
}
constexpr CoarsePowers make_coarse_powers(int scale) {
  CoarsePowers table{};
  for (int j = 0; j < 16; ++j) {
    const double x = j * (0.69314718055994531 / 16);
    double exact = 0, term = 1;
    for (int k = 1; k < 40; ++k) exact += term, term *= x / k;
    const int coarse = static_cast<int>(exact * 64 + 0.5);
    table.mantissas[j] = float_of_bits(((127 + scale) << 23) + ((coarse - 64) << 17) - (j << 19));
    table.lost[j] = static_cast<float>(log_one_plus_constant(exact * 64 / coarse - 1));
  }
  return table;
}
template <int kScale>
constexpr CoarsePowers kCoarsePowers = make_coarse_powers(kScale);

// g by a polynomial around each k / (kEntries - 1), in d = (kEntries - 1) e - k, within 1/2: leading (1 + terms[0] + terms[1] d
// + ...).
constexpr int kEntries = RSL_ISA == 256 ? 8 : 16;
constexpr int kDegree = kEntries == 8 ? 7 : 5;
struct RatioTable {
  alignas(64) float leading[kEntries];
  alignas(64) float terms[kDegree + 1][kEntries];
};

constexpr double rounded_to_bits(double x, int bits) {
  double scale = 1;
  for (; x * scale < (1 << (bits - 1)); scale *= 2) {}
  return static_cast<int>(x * scale + 0.5) / scale;
}

constexpr RatioTable make_ratio_table(int gamma) {
  constexpr int kSeries = 12;
  const double step = 1.0 / (kEntries - 1), half = step / 2;
  double chebyshev[kSeries][kSeries] = {};  // coefficients of the polynomials
  chebyshev[0][0] = chebyshev[1][1] = 1;
  for (int n = 2; n < kSeries; ++n)
    for (int k = 0; k < kSeries; ++k) chebyshev[n][k] = (k > 0 ? 2 * chebyshev[n - 1][k - 1] : 0) - chebyshev[n - 2][k];
  RatioTable table{};
  for (int i = 0; i < kEntries; ++i) {
    // The Taylor series of log1p, divided by e, then by powers of 1 + e.
    const double center = i * step;
    double series[kSeries + 1] = {log_one_plus_constant(center)}, power = 1;
    for (int k = 1; k <= kSeries; ++k) power /= 1 + center, series[k] = (k % 2 ? power : -power) / k;
    for (int k = 0; k < kSeries; ++k) series[k] = i == 0 ? series[k + 1] : (series[k] - (k > 0 ? series[k - 1] : 0)) / center;
    for (int times = 0; times < gamma; ++times)
      for (int k = 0; k < kSeries; ++k) series[k] = (series[k] - (k > 0 ? series[k - 1] : 0)) / (1 + center);
    // Shortened where it costs least within the interval.
    power = 1;
    for (int k = 0; k < kSeries; ++k, power *= half) series[k] *= power;
    for (int n = kSeries - 1; n > kDegree; --n) {
      const double factor = series[n] / chebyshev[n][n];
      for (int k = 0; k <= n; ++k) series[k] -= factor * chebyshev[n][k];
    }
    const double leading = rounded_to_bits(series[0], gamma == 0 ? 10 : 3);
    table.leading[i] = static_cast<float>(leading);
    power = 1;
    for (int k = 0; k <= kDegree; ++k, power *= 2)
      table.terms[k][i] = static_cast<float>((series[k] / leading - (k == 0 ? 1 : 0)) * power);
  }
  return table;
}
template <int kGamma>
constexpr RatioTable kRatioTable = make_ratio_table(kGamma);

// coarse (1 + rest); coarse has seven bits.
struct CoarseFloat {
  FloatVec coarse;
  FloatVec rest;
};

// 2^kScale e^-(x + low) for x in [0, 120] where that is in the normal range.
template <int kScale>
static inline CoarseFloat exp_minus_coarse(FloatVec x, FloatVec low) {
  const FloatVec shifted = x * -23.0831207f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const FloatVec lost = look_up_by_bits<kSixteenthsVectors>(kCoarsePowers<kScale>.lost, shifted);
  // The first product and difference are exact, also without fused operations.
  const FloatVec r = ((n * -0x1.62ep-5f - x) - n * 1.99663656e-6f) + (lost - low), square = r * r;
  const FloatVec mantissa = look_up_by_bits<kSixteenthsVectors>(kCoarsePowers<kScale>.mantissas, shifted);
  // Unsigned: of an element that the caller drops the sum may overflow.
  const UnsignedVec power = reinterpret_cast<UnsignedVec>(mantissa) + (reinterpret_cast<UnsignedVec>(shifted) << 19);
  return {reinterpret_cast<FloatVec>(power), square * ((r * 0.16666667f + 0.5f) + square * 0.041666667f) + r};
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
  FloatVec sum = look_up_by_bits<1>(table.terms[kDegree], shifted);
  for (int k = kDegree - 1; k >= 0; --k) sum = sum * d + look_up_by_bits<1>(table.terms[k], shifted);
  FloatVec high = look_up_by_bits<1>(table.leading, shifted) * e.coarse, rest = e.rest;
  if constexpr (kGamma >= 1) high *= e.coarse;
  if constexpr (kGamma >= 2) high *= e.coarse;
  if constexpr (kGamma == 1) rest *= rest + 2;
  if constexpr (kGamma == 2) rest *= rest * (rest + 3) + 3;
  const FloatVec part = high * rest;
  return {high, sum * (high + part) + part};
}

// Losses of any gamma are multiplied by a power of two, so that also those whose power of q leaves the range of float count.
template <int kGamma>
constexpr int kBackgroundScale = kGamma < 0 ? 96 : 0;
template <int kGamma>
constexpr double kBackgroundUnscale = kGamma < 0 ? 0x1p-96 : 1;
constexpr float kFarthestBackground = 28;
constexpr float kLargestBackgroundExponent = 110;

// -x of background, which that is; within its range for any x.
static inline uint32_t background_lanes(FloatVec x) {
  return at_most_mask(x, FloatVec{}) & at_most_mask(all_floats(-kFarthestBackground), x);
}
static inline FloatVec background_distance(FloatVec x) {
  const FloatVec farthest = all_floats(kFarthestBackground), none = {}, distance = none < -x ? -x : none;
  return distance < farthest ? distance : farthest;
}

// m S with m = q^gamma 2^kScale for S = entropy = log1p(e^-distance); m as well.
struct PoweredEntropy {
  FloatSum loss;
  FloatVec power;
  uint32_t is_near;  // what is not is any number
};
template <int kScale>
static inline PoweredEntropy powered_entropy(FloatVec distance, FloatSum entropy, FloatVec gamma_high, FloatVec gamma_low) {
  // softplus(-z) and its product with gamma as sums of two.
  const FloatVec sum = entropy.high + entropy.low, lost = entropy.low - (sum - entropy.high);
  const FloatVec high = distance + sum, part = high - distance;
  const FloatVec low = ((distance - (high - part)) + (sum - part)) + lost, product = gamma_high * high;
  const FloatVec product_low = product_error(gamma_high, high, product) + (gamma_high * low + gamma_low * high);
  const CoarseFloat m = exp_minus_coarse<kScale>(product, product_low);
  const FloatVec loss_high = m.coarse * entropy.high, part_low = m.coarse * entropy.low;
  return {{loss_high, (loss_high + part_low) * m.rest + part_low},
          m.coarse * m.rest + m.coarse,
          at_most_mask(product, all_floats(kLargestBackgroundExponent))};
}

// Where the sums of classes are: nowhere, one for the block, one for each entry of the columns.
enum class ClassSums { kNone, kOfBlock, kOfEntries };

static inline void add_doubles(DoublePair& sum, FloatVec x) { sum.low += low_doubles(x), sum.high += high_doubles(x); }

// Adds the losses of the targets of 0 of a block, and their slopes to the sums. What floats cannot take becomes `left_over`.
// kOneWeight: all classes of the block have the first one's weight. Elements have no weights of their own. In stages, each a
// loop over the block with a short chain: a processor sees far enough ahead to be busy.
template <int kGamma, ClassSums kSums, bool kOneWeight>
[[gnu::flatten, gnu::noinline]] static void sum_background(const float* logits, const FocalBlock& block, uint64_t* left_over,
                                                           DoublePair& result) {
  constexpr int kModulated = kGamma < 0 ? 0 : kGamma;
  const ClassColumns& columns = block.columns;
  const FloatVec none = {};
  alignas(64) float coarse[kBlock], rest[kBlock], entropy_high[kGamma < 0 ? kBlock : 1], entropy_low[kGamma < 0 ? kBlock : 1];
  for (int i = 0; i < block.size; i += kFloats) {
    const CoarseFloat e = exp_minus_coarse<0>(background_distance(load_floats(logits + i)), none);
    store_floats(coarse + i, e.coarse), store_floats(rest + i, e.rest);
  }
  const auto exponential = [&](int i) { return CoarseFloat{load_floats(coarse + i), load_floats(rest + i)}; };
  if constexpr (kGamma < 0) {
    for (int i = 0; i < block.size; i += kFloats) {
      const FloatSum entropy = modulated_entropy<0>(exponential(i));
      store_floats(entropy_high + i, entropy.high), store_floats(entropy_low + i, entropy.low);
    }
  }
  DoublePair losses = {}, slopes = {};
  uint64_t any = 0;
  for (int begin = 0; begin < block.size; begin += 64) {
    const uint64_t wanted = block.negative[begin / 64];
    uint64_t taken = 0;
    // Few of the small parts, and of the slopes, are added in float.
    FloatVec small = none, pulls = none;
    for (int i = begin; i < begin + 64 && i < block.size; i += kFloats) {
      const FloatVec z = load_floats(logits + i);
      uint32_t lanes = static_cast<uint32_t>(wanted >> (i - begin)) & background_lanes(z);
      const CoarseFloat e = exponential(i);
      FloatSum loss;
      FloatVec power = none, gamma = all_floats(kModulated);
      if constexpr (kGamma < 0) {
        gamma = column_of(columns.gamma_high, block, i);
        const FloatSum entropy = {load_floats(entropy_high + i), load_floats(entropy_low + i)};
        const PoweredEntropy powered = powered_entropy<kBackgroundScale<kGamma>>(background_distance(z), entropy, gamma,
                                                                                 column_of(columns.gamma_low, block, i));
        loss = powered.loss, power = powered.power, lanes &= powered.is_near;
      } else {
        loss = modulated_entropy<kModulated>(e);
      }
      taken |= uint64_t{lanes} << (i - begin);
      const FloatVec high = choose(lanes, loss.high, none), low = choose(lanes, loss.low, none);
      if constexpr (kOneWeight) {
        add_doubles(losses, high);
        small += low;
      } else {
        // Times the sum of two floats.
        const FloatVec w = load_floats(columns.negative_rounded + i), product = high * w;
        add_doubles(losses, product);
        small += product_error(high, w, product) + (low * w + high * load_floats(columns.negative_lost + i));
      }
      if constexpr (kSums != ClassSums::kNone) {
        const FloatVec near = e.coarse * e.rest + e.coarse, remainder = reciprocal(1 + near), q = near * remainder;
        FloatVec slope = q;
        if constexpr (kGamma == 1) power = q;
        if constexpr (kGamma == 2) power = q * q;
        if constexpr (kGamma != 0) slope = gamma * remainder * (loss.high + loss.low) + power * q;
        slope = choose(lanes, slope, none);
        if constexpr (kSums == ClassSums::kOfBlock) pulls += slope;
        else store_floats(block.negative_pulls + i, load_floats(block.negative_pulls + i) + slope);
      }
      if (RSL_ISA == 512 || (i + kFloats) % (4 * kFloats) != 0) continue;
      add_doubles(losses, small), add_doubles(slopes, pulls);
      small = pulls = none;
    }
    add_doubles(losses, small), add_doubles(slopes, pulls);
    left_over[begin / 64] = wanted & ~taken;
    any |= taken;
  }
  // An infinite weight multiplies nothing where there is nothing.
  if (any == 0) return;
  const double factor = kBackgroundUnscale<kGamma> * (kOneWeight ? columns.negative[0] : 1);
  result.low += factor * losses.low, result.high += factor * losses.high;
  if constexpr (kSums == ClassSums::kOfBlock) {
    const double size = factor < 0 ? -factor : factor;
    const DoublePair before = load_doubles(block.negative_sums);
    store_doubles(block.negative_sums, {before.low + size * slopes.low, before.high + size * slopes.high});
  }
}
