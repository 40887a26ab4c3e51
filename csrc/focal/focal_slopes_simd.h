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

// Slopes times a weight w, which is multiplied in first, so that nothing is below the normal range unless the product is.

// Of gamma 0, 1 and 2.
template <int kGamma>
static inline FloatVec slope_by_table(FloatVec w, FloatVec e) {
  if constexpr (kGamma == 0) return w * e * reciprocal(1 + e);
  constexpr const SlopeTable& table = kSlopeTable<kGamma>;
  const FloatVec shifted = e * float{kEntries - 1} + 0x1.8p23f, d = e * float{kEntries - 1} - (shifted - 0x1.8p23f);
  FloatVec sum = look_up_by_bits<kEntries>(table.terms[kSlopeDegree], shifted);
  for (int k = kSlopeDegree - 1; k >= 0; --k) sum = sum * d + look_up_by_bits<kEntries>(table.terms[k], shifted);
  const FloatVec slope = w * e * sum * e;
  return kGamma == 1 ? slope : slope * e;
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
  return choose(at_most_mask(exponent.high, limit), power - power * exponent.low, FloatVec{});
}

// Of any gamma: w m larger (rate softplus + other).
static inline FloatVec slope_of(FloatVec w, FloatVec m, FloatVec larger, FloatVec rate, FloatVec softplus, FloatVec other) {
  return w * (rate * softplus + other) * larger * m;
}

// dL/dx of a target of 0 or 1 in floats for |x| = distance within [0, 86]. positive: the lanes with x > 0. At
// others the bits are those of write_background.
template <int kGamma>
static inline FloatVec hard_slope(FloatVec w, FloatVec distance, uint32_t positive, FloatVec gamma_high, FloatVec gamma_low) {
  const FloatVec e = exp_minus(distance), larger = reciprocal(1 + e), one = all_floats(1), none = FloatVec{};
  if constexpr (kGamma == 0) return choose(positive, w, w * e) * larger;
  const FloatVec log_part = log_one_plus(e), softplus = choose(positive, log_part + distance, log_part);
  if constexpr (kGamma > 0) {
    const FloatVec square = kGamma == 1 ? larger : larger * larger;
    const FloatVec above = w * (float{kGamma} * e * softplus + 1) * (square * larger);
    return choose(positive, above, slope_by_table<kGamma>(w, e));
  }
  const FloatSum exponent = modulating_exponent(choose(positive, none, distance), log_part, gamma_high, gamma_low);
  const FloatVec m = exp_minus_sum(exponent), rate = choose(positive, gamma_high * e, gamma_high);
  return slope_of(w, m, larger, rate, softplus, choose(positive, one, e));
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

// Writes all of a block, 0 where the target is not; behind the first stage. The targets of 0 at other logits are left over;
// returns whether any are.
template <int kGamma>
[[gnu::flatten, gnu::noinline]] static bool write_background(const float* logits, const FocalBlock& block, SlopeStages& stages,
                                                             uint64_t* left_over, float* output) {
  uint64_t any = 0;
  for (int word = 0; word < block.words(); ++word) any |= left_over[word] = block.negative[word] & ~stages.taken[word];
  if constexpr (kGamma < 0) modulate_slopes(logits, block, stages);
  for (int begin = 0; begin < block.size; begin += 64) {
    for_vectors_of_word(begin, block.size, [&](int i, int bit) {
      const uint32_t lanes = static_cast<uint32_t>(stages.taken[begin / 64] >> bit) & kAllFloats;
      const FloatVec e = load_floats(stages.exponential + i), w = float_weight(block.columns.negative_rounded, block, i);
      FloatVec slope;
      if constexpr (kGamma < 0) {
        const FloatVec m = load_floats(stages.modulation.high + i), gamma = column_of(block.columns.gamma_high, block, i);
        slope = slope_of(w, m, reciprocal(1 + e), gamma, load_floats(stages.entropy + i), e);
      } else {
        slope = slope_by_table<kGamma>(w, e);
      }
      store_floats(output + i, choose(lanes, slope, FloatVec{}));
    });
  }
  return any != 0;
}
