// The losses of targets of 0 at logits z <= 0, and the sums of their slopes, in floats (focal_functions_simd.h). Part of
// focal_simd.h.
//
// In stages, each a loop over the block with a short chain of operations, so that a processor sees far enough ahead to be busy:
// what one stage leaves to the next is in FocalStages.

// Losses of any gamma are multiplied by a power of two, so that also those whose power of q leaves the range of float count.
template <int kGamma>
constexpr int kBackgroundScale = kGamma < 0 ? 96 : 0;
template <int kGamma>
constexpr double kBackgroundUnscale = kGamma < 0 ? 0x1p-96 : 1;
constexpr float kLargestBackgroundExponent = 110;

// How far a logit is below 0, and the lanes in which it is that, but not farther than: as integers, where the bits of what is
// above 0, and of NaN, are beyond any limit.
static inline FloatVec distance_below(FloatVec z) { return FloatVec{} - z; }
static inline uint32_t lanes_within(FloatVec distance, float farthest) {
  return at_most_mask(reinterpret_cast<UnsignedVec>(distance), reinterpret_cast<UnsignedVec>(all_floats(farthest)));
}

// Where the sums of classes are: nowhere, one for the block, one for each entry of the columns.
enum class ClassSums { kNone, kOfBlock, kOfEntries };

static inline void add_doubles(DoublePair& sum, DoublePair x) { sum.low += x.low, sum.high += x.high; }
static inline void add_where(DoublePair& sum, uint32_t lanes, DoublePair x) {
  sum.low += choose(lanes & kAllDoubles, x.low, DoubleVec{}), sum.high += choose(lanes >> kDoubles, x.high, DoubleVec{});
}

// Calls body(i, bit) for the vectors of 64 elements from `begin` on, fewer where they end: they are the bits of a word.
template <class Body>
static inline void for_vectors_of_word(int begin, int end, const Body& body) {
  if (end - begin < 64) {
    for (int i = begin; i < end; i += kFloats) body(i, i - begin);
  } else {
#pragma GCC unroll 16
    for (int bit = 0; bit < 64; bit += kFloats) body(begin + bit, bit);
  }
}

// Calls body(i, z) for the vectors of a block's logits z, where body returns the lanes that it takes: of `negative` they become
// `taken`. Returns the logits in float.
template <class In, class Body>
static inline const float* for_logits(const In* logits, const FocalBlock& block, float* widened, uint64_t* taken,
                                      const Body& body) {
  // Narrow ones are widened on the way, but for those that fill no vectors.
  const bool widens = sizeof(In) < 4 && block.size % kFloats == 0;
  const float* values = widens ? widened : widen_values(logits, block.size, widened);
  for (int begin = 0; begin < block.size; begin += 64) {
    uint64_t within = 0;
    for_vectors_of_word(begin, block.size, [&](int i, int bit) {
      const FloatVec z = widens ? load_floats(logits + i) : load_floats(values + i);
      if (widens) store_floats(widened + i, z);
      within |= uint64_t{body(i, z)} << bit;
    });
    taken[begin / 64] = within & block.negative[begin / 64];
  }
  return values;
}

// Two numbers of each element of a block.
struct StageValues {
  alignas(64) float high[kBlock];
  alignas(64) float low[kBlock];
};
static inline FloatSum load_sum(const StageValues& values, int i) {
  return {load_floats(values.high + i), load_floats(values.low + i)};
}
static inline CoarseFloat load_coarse(const StageValues& values, int i) {
  return {load_floats(values.high + i), load_floats(values.low + i)};
}
static inline void store_values(StageValues& values, int i, FloatVec high, FloatVec low) {
  store_floats(values.high + i, high), store_floats(values.low + i, low);
}

struct FocalStages {
  StageValues exponential;      // e, coarse and rest
  StageValues loss;             // without the weight; of any gamma at first S
  StageValues modulation;       // of any gamma at first gamma softplus(-z), then m, coarse and rest
  uint64_t taken[kBlockWords];  // elements that floats can take
};

// The first stage: e and who is taken.
template <class In>
[[gnu::flatten, gnu::noinline]] static const float* find_exponentials(const In* logits, const FocalBlock& block, float* widened,
                                                                      FocalStages& stages) {
  return for_logits(logits, block, widened, stages.taken, [&](int i, FloatVec z) {
    const FloatVec distance = distance_below(z);
    const CoarseFloat e = exp_minus_coarse<0>(distance, FloatVec{});
    store_values(stages.exponential, i, e.coarse, e.rest);
    return lanes_within(distance, kFarthestBackground);
  });
}

// m S from S, with m = q^gamma 2^kScale for any gamma.
template <int kScale>
static inline void modulate_losses(const float* logits, const FocalBlock& block, FocalStages& stages) {
  for (int begin = 0; begin < block.size; begin += 64) {
    uint64_t within = 0;
    for_vectors_of_word(begin, block.size, [&](int i, int bit) {
      const FloatVec distance = distance_below(load_floats(logits + i));
      const FloatVec gamma_high = column_of(block.columns.gamma_high, block, i);
      const FloatVec gamma_low = column_of(block.columns.gamma_low, block, i);
      const FloatSum entropy = load_sum(stages.loss, i);
      // softplus(-z) and its product with gamma as sums of two.
      const FloatVec sum = entropy.high + entropy.low, lost = entropy.low - (sum - entropy.high);
      const FloatVec high = distance + sum, part = high - distance;
      const FloatVec low = ((distance - (high - part)) + (sum - part)) + lost, product = gamma_high * high;
      const FloatVec product_low = product_error(gamma_high, high, product) + (gamma_high * low + gamma_low * high);
      within |= uint64_t{lanes_within(product, kLargestBackgroundExponent)} << bit;
      store_values(stages.modulation, i, product, product_low);
    });
    stages.taken[begin / 64] &= within;
  }
  for (int i = 0; i < block.size; i += kFloats) {
    const FloatSum exponent = load_sum(stages.modulation, i);
    const CoarseFloat m = exp_minus_coarse<kScale>(exponent.high, exponent.low);
    store_values(stages.modulation, i, m.coarse, m.rest);
  }
  for (int i = 0; i < block.size; i += kFloats) {
    const CoarseFloat m = load_coarse(stages.modulation, i);
    const FloatSum entropy = load_sum(stages.loss, i);
    const FloatVec high = m.coarse * entropy.high, low = m.coarse * entropy.low;
    store_values(stages.loss, i, high, (high + low) * m.rest + low);
  }
}

// Calls take(i, bit, slope) for the word from `begin` on, with dL/dz without the weight and times the scale; 0 where the
// element is not taken.
template <int kGamma, class Take>
static inline void for_background_slopes(const FocalBlock& block, const FocalStages& stages, int begin, const Take& take) {
  for_vectors_of_word(begin, block.size, [&](int i, int bit) {
    const uint32_t lanes = static_cast<uint32_t>(stages.taken[begin / 64] >> bit) & kAllFloats;
    const CoarseFloat e = load_coarse(stages.exponential, i);
    const FloatVec near = e.coarse * e.rest + e.coarse, remainder = reciprocal(1 + near), q = near * remainder;
    FloatVec slope = q;
    if constexpr (kGamma != 0) {
      const FloatSum loss = load_sum(stages.loss, i);
      FloatVec gamma = all_floats(kGamma), power = kGamma == 1 ? q : q * q;
      if constexpr (kGamma < 0) {
        const CoarseFloat m = load_coarse(stages.modulation, i);
        gamma = column_of(block.columns.gamma_high, block, i), power = m.coarse * m.rest + m.coarse;
      }
      slope = gamma * remainder * (loss.high + loss.low) + power * q;
    }
    take(i, bit, choose(lanes, slope, FloatVec{}));
  });
}

// Adds the losses of the targets of 0 of a block, and their slopes to the sums; behind the first stage. What floats cannot take
// becomes `left_over`; returns whether anything does.
// kOneWeight: all classes of the block have the first one's weight. Elements have no weights of their own.
template <int kGamma, ClassSums kSums, bool kOneWeight>
[[gnu::flatten, gnu::noinline]] static bool sum_background(const float* logits, const FocalBlock& block, FocalStages& stages,
                                                           uint64_t* left_over, DoublePair& result) {
  const ClassColumns& columns = block.columns;
  const FloatVec none = {};
  for (int i = 0; i < block.size; i += kFloats) {
    const FloatSum loss = modulated_entropy<(kGamma < 0 ? 0 : kGamma)>(load_coarse(stages.exponential, i));
    store_values(stages.loss, i, loss.high, loss.low);
  }
  if constexpr (kGamma < 0) modulate_losses<kBackgroundScale<kGamma>>(logits, block, stages);

  DoublePair losses = {}, small_losses = {}, slopes = {};
  uint64_t any = 0;
  for (int begin = 0; begin < block.size; begin += 64) {
    const uint64_t taken = stages.taken[begin / 64];
    // Few of the small parts, and of the slopes, are added in float.
    FloatVec small = none, pulls = none;
    const auto widen_some = [&](int bit, DoublePair& sum, FloatVec& part) {
      // What is left is added behind the loop.
      if (RSL_ISA == 512 || (bit + kFloats) % (4 * kFloats) != 0 || bit + kFloats == 64) return;
      add_doubles(sum, widen_floats(part));
      part = FloatVec{};
    };
    for_vectors_of_word(begin, block.size, [&](int i, int bit) {
      const uint32_t lanes = static_cast<uint32_t>(taken >> bit) & kAllFloats;
      const FloatVec low = choose(lanes, load_floats(stages.loss.low + i), none);
      if constexpr (kOneWeight) {
        add_where(losses, lanes, load_doubles(stages.loss.high + i));
        small += low;
      } else {
        // Times the sum of two floats.
        const FloatVec high = choose(lanes, load_floats(stages.loss.high + i), none);
        const FloatVec w = load_floats(columns.negative_rounded + i), product = high * w;
        add_doubles(losses, widen_floats(product));
        small += product_error(high, w, product) + (low * w + high * load_floats(columns.negative_lost + i));
      }
      widen_some(bit, small_losses, small);
    });
    add_doubles(small_losses, widen_floats(small));
    if constexpr (kSums != ClassSums::kNone) {
      for_background_slopes<kGamma>(block, stages, begin, [&](int i, int bit, FloatVec slope) {
        if constexpr (kSums == ClassSums::kOfBlock) pulls += slope, widen_some(bit, slopes, pulls);
        else store_floats(block.negative_pulls + i, load_floats(block.negative_pulls + i) + slope);
      });
      add_doubles(slopes, widen_floats(pulls));
    }
    any |= left_over[begin / 64] = block.negative[begin / 64] & ~taken;
  }
  add_doubles(losses, small_losses);
  const double factor = kBackgroundUnscale<kGamma> * (kOneWeight ? columns.negative[0] : 1);
  // An infinite weight multiplies nothing where there is nothing.
  const auto multiplied = [](DoublePair sum, double w) {
    return DoublePair{sum.low == 0.0 ? sum.low : w * sum.low, sum.high == 0.0 ? sum.high : w * sum.high};
  };
  add_doubles(result, multiplied(losses, factor));
  if constexpr (kSums == ClassSums::kOfBlock) {
    DoublePair sums = load_doubles(block.negative_sums);
    add_doubles(sums, multiplied(slopes, factor < 0 ? -factor : factor));
    store_doubles(block.negative_sums, sums);
  }
  return any != 0;
}
