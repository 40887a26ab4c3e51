// The gradients of targets of 0 at logits z <= 0 in floats, right to 1e-6 for gamma up to 8 and 2e-6 up to 12, in stages as the
// losses (focal_background_simd.h). Part of focal_simd.h.

// The weight of a class times that of the element.
static inline FloatVec float_weight(const float* column, const FocalBlock& block, int i) {
  const FloatVec w = column_of(column, block, i);
  if (block.weight == nullptr) return w;
  const DoublePair v = load_doubles(block.weight + i);
  return w * to_floats(v.low, v.high);
}

// What a stage leaves to the next.
struct SlopeStages {
  alignas(64) float exponential[kBlock];  // e
  // Of any gamma.
  alignas(64) float entropy[kBlock];  // S = log1p(e)
  StageValues modulation;             // gamma softplus(-z), then m = q^gamma
  uint64_t taken[kBlockWords];
};

// The first stage: e and who is taken.
template <class In>
[[gnu::flatten, gnu::noinline]] static const float* find_exponentials(const In* logits, const FocalBlock& block, float* widened,
                                                                      SlopeStages& stages) {
  return for_logits(logits, block, widened, stages.taken, [&](int i, FloatVec z) {
    const FloatVec distance = distance_below(z);
    store_floats(stages.exponential + i, exp_minus(distance));
    return lanes_within(distance, kLargestFloatExponent);
  });
}

// Of gamma 0, 1 and 2. first: e, or a multiple of it for a multiple of the slope.
template <int kGamma>
static inline FloatVec slope_by_table(FloatVec first, FloatVec e) {
  if constexpr (kGamma == 0) return first * reciprocal(1 + e);
  constexpr const SlopeTable& table = kSlopeTable<kGamma>;
  const FloatVec shifted = e * float{kEntries - 1} + 0x1.8p23f, d = e * float{kEntries - 1} - (shifted - 0x1.8p23f);
  FloatVec sum = look_up_by_bits<kEntries>(table.terms[kSlopeDegree], shifted);
  for (int k = kSlopeDegree - 1; k >= 0; --k) sum = sum * d + look_up_by_bits<kEntries>(table.terms[k], shifted);
  return (kGamma == 1 ? first * e : first * e * e) * sum;
}

// gamma softplus(-z) for z = -distance as the sum of two floats: what is lost by rounding it would show.
static inline FloatSum modulating_exponent(FloatVec distance, FloatVec entropy, FloatVec gamma_high, FloatVec gamma_low) {
  const FloatVec product = gamma_high * distance;
  const FloatVec other = gamma_high * entropy + (product_error(gamma_high, distance, product) + gamma_low * distance);
  const FloatVec sum = product + other, part = sum - product;
  return {sum, (product - (sum - part)) + (other - part)};
}
static inline FloatVec exp_minus_sum(FloatSum exponent) {
  const FloatVec power = exp_minus(exponent.high), limit = all_floats(kLargestFloatExponent);
  // The product with `low` is below the normal range long before the power is.
  const FloatVec m = RSL_ISA == 0 ? power * (1 - exponent.low) : minus_product(power, power, exponent.low);
  return choose(at_most_mask(exponent.high, limit), m, FloatVec{});
}

// dL/dx of a target of 0 or 1 in floats for |x| = distance within [0, 86]. positive: the lanes with x > 0. At
// others the bits are those of write_background.
template <int kGamma>
static inline FloatVec hard_slope(FloatVec distance, uint32_t positive, FloatVec gamma_high, FloatVec gamma_low) {
  const FloatVec e = exp_minus(distance), larger = reciprocal(1 + e), one = all_floats(1), none = FloatVec{};
  if constexpr (kGamma == 0) return choose(positive, larger, e * larger);
  const FloatVec log_part = log_one_plus(e), softplus = choose(positive, log_part + distance, log_part);
  if constexpr (kGamma > 0) {
    const FloatVec square = kGamma == 1 ? larger : larger * larger;
    const FloatVec above = square * larger * (float{kGamma} * e * softplus + 1);
    return choose(positive, above, slope_by_table<kGamma>(e, e));
  }
  const FloatSum exponent = modulating_exponent(choose(positive, none, distance), log_part, gamma_high, gamma_low);
  const FloatVec m = exp_minus_sum(exponent), rate = choose(positive, gamma_high * e, gamma_high);
  return m * larger * (rate * softplus + choose(positive, one, e));
}

// q^gamma, of any gamma.
static inline void modulate_slopes(const float* logits, const FocalBlock& block, SlopeStages& stages) {
  for (int i = 0; i < block.size; i += kFloats) {
    const FloatVec distance = distance_below(load_floats(logits + i)),
                   entropy = log_one_plus(load_floats(stages.exponential + i));
    const FloatSum exponent = modulating_exponent(distance, entropy, column_of(block.columns.gamma_high, block, i),
                                                  column_of(block.columns.gamma_low, block, i));
    store_floats(stages.entropy + i, entropy), store_values(stages.modulation, i, exponent.high, exponent.low);
  }
  for (int i = 0; i < block.size; i += kFloats)
    store_floats(stages.modulation.high + i, exp_minus_sum(load_sum(stages.modulation, i)));
}

// A slope times its weight from 2^64 times the slope. Below the normal range the bits of a float are those of a multiple of the
// smallest.
static inline FloatVec weigh_scaled(FloatVec scaled, const float* column, const FocalBlock& block, int i) {
  DoublePair w = widen_floats(column_of(column, block, i));
  if (block.weight != nullptr) {
    const DoublePair v = load_doubles(block.weight + i);
    w.low *= v.low, w.high *= v.high;
  }
  const FloatVec product = to_floats(low_doubles(scaled) * w.low, high_doubles(scaled) * w.high), size = absolute(product);
  const IntVec sign = reinterpret_cast<IntVec>(product) & static_cast<int32_t>(0x80000000);
  const uint32_t is_below = at_most_mask(size, all_floats(0x1p-62f));
  const IntVec multiple = truncate(choose(is_below, size, FloatVec{}) * 0x1p85f + 0.5f) | sign;
  return choose(is_below, reinterpret_cast<FloatVec>(multiple), product * 0x1p-64f);
}

// Writes all of a block, 0 where the target is not; behind the first stage. The targets of 0 at other logits are left over;
// returns whether any are.
template <int kGamma>
[[gnu::flatten, gnu::noinline]] static bool write_background(const float* logits, const FocalBlock& block, SlopeStages& stages,
                                                             uint64_t* left_over, float* output) {
  uint64_t any = 0;
  for (int word = 0; word < block.words(); ++word) any |= left_over[word] = block.negative[word] & ~stages.taken[word];
  // Of a large gamma many slopes are below the normal range: those are computed apart.
  constexpr bool kFlushes = kGamma < 0;
  const FlushSubnormals flush(kFlushes);
  if constexpr (kGamma < 0) modulate_slopes(logits, block, stages);
  for (int begin = 0; begin < block.size; begin += 64) {
    for_vectors_of_word(begin, block.size, [&](int i, int bit) {
      const uint32_t lanes = static_cast<uint32_t>(stages.taken[begin / 64] >> bit) & kAllFloats;
      const FloatVec e = load_floats(stages.exponential + i);
      const auto multiple = [&](FloatVec times) {
        if constexpr (kGamma >= 0) return slope_by_table<kGamma>(e * times, e);
        const FloatVec m = load_floats(stages.modulation.high + i), gamma = column_of(block.columns.gamma_high, block, i);
        return m * times * reciprocal(1 + e) * (gamma * load_floats(stages.entropy + i) + e);
      };
      FloatVec slope = multiple(all_floats(1)) * float_weight(block.columns.negative_rounded, block, i);
      // Or NaN, as an infinite weight makes of what was flushed.
      const uint32_t flushed = kFlushes ? lanes & ~greater_mask(absolute(slope), FloatVec{}) : 0;
      if (__builtin_expect(flushed != 0, 0)) {
        const FloatVec apart = weigh_scaled(multiple(all_floats(0x1p64f)), block.columns.negative_rounded, block, i);
        slope = choose(flushed, apart, slope);
      }
      store_floats(output + i, choose(lanes, slope, FloatVec{}));
    });
  }
  return any != 0;
}
