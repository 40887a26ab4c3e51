// Chunks of a level -> counts and losses by bin, or gradients. Compiled once per instruction set (common/for_each_isa.h).
// A block of elements at a time: targets and weights become bit masks (ghm_masks_simd.h); float logits with targets 0 or 1 take
// the float path here, everything else the float64 one (ghm_wide_simd.h).
#include "common/vectors_simd.h"
#include "ghm/ghm_masks_simd.h"
#include "ghm/ghm_wide_simd.h"

// Beyond it e^-|u| may leave the normal range of float.
constexpr float kLargestFloatLogit = 87;

// e^-x for x in [0, 87], as a sum that is right to 4e-9 before it is rounded; `low` is below a tenth of it.
struct FloatPair {
  FloatVec high;
  FloatVec low;
};

static inline FloatPair exp_minus_pair(FloatVec x) {
  const FloatVec shifted = x * -1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  // The first product and difference are exact, so that only terms of second order are rounded.
  const FloatVec r = -x - n * 0x1.62ep-1f, rest = n * -0x1.0bfbe8p-15f, argument = r + rest;
  FloatVec sum = all_floats(1.39504874814332e-3f);
  const float coefficients[] = {8.368887645837e-3f, 4.1666205857511e-2f, 0.16666518853765f, 0.5000000095168f};
  for (const float coefficient : coefficients) sum = sum * argument + coefficient;
  const FloatVec one_plus_r = 1 + r, lost = r - (one_plus_r - 1);
  const IntVec power = (reinterpret_cast<IntVec>(shifted) << 23) + reinterpret_cast<IntVec>(all_floats(1));
  const FloatVec scale = reinterpret_cast<FloatVec>(power);
  return {one_plus_r * scale, (lost + (rest + argument * argument * sum)) * scale};
}

// log(1 + e) = kLinear e + low: most of it is exact in float64, and the rounding of `low` does not matter.
constexpr float kLinear = 0.845703125f;

static inline FloatVec log_rest(FloatPair e, FloatVec value) {
  const float coefficients[] = {0.020278441733308f,  -0.057760400456998f, 0.106846635989217f,
                                -0.153533515386677f, 0.196924797381253f,  -0.249573517087315f,
                                0.3333027605286f,    -0.499999141902262f, 0.154296871012888f};
  FloatVec sum = all_floats(-3.338880238758717e-3f);
  for (const float coefficient : coefficients) sum = sum * value + coefficient;
  return value * sum + kLinear * e.low;
}

static inline FloatVec sigmoid_from_exp(uint32_t positive, FloatVec e, FloatVec reciprocal) {
  return choose(positive, reciprocal, e * reciprocal);
}

// sigma may be wrong by 4e-4 of itself, which is less than a bin: one comparison decides.
static inline IntVec bins_of(const GhmEdges& edges, FloatVec u, FloatVec sigma) {
  const IntVec lowest = truncate(sigma * (static_cast<float>(edges.bins) * (1 - 0x1p-10f)));
  return lowest - (u >= look_up(edges.hard_above, lowest));
}

// Logits as they are compared, and which elements of a vector of the block the float path takes.
struct HardLogits {
  FloatVec u;
  FloatVec distance;
  uint32_t one;
  uint32_t mask;
};

template <class In>
static inline HardLogits load_hard(const In* preds, const GhmBlock& block, int i, uint64_t& left_over) {
  const int word = i / 64, shift = i % 64;
  const uint32_t valid = static_cast<uint32_t>(block.valid[word] >> shift) & kAllFloats;
  const uint32_t one = static_cast<uint32_t>(block.one[word] >> shift) & kAllFloats;
  const uint32_t soft = static_cast<uint32_t>(block.soft[word] >> shift) & kAllFloats;
  const FloatVec z = load_some(preds + i, block.size - i), limit = all_floats(kLargestFloatLogit);
  const FloatVec distance = absolute(z);
  const uint32_t mask = valid & ~soft & at_most_mask(distance, limit);
  left_over |= static_cast<uint64_t>(valid & ~mask) << shift;
  return {negate_where(one, z), distance < limit ? distance : limit, one, mask};
}

template <class In>
static void add_float(const In* preds, const GhmBlock& block, const GhmEdges& edges, uint64_t* left_over, GhmSums* sums) {
  alignas(64) double losses[kBlock];
  alignas(64) int32_t bins[kBlock];
  const DoubleVec linear = all_doubles(kLinear);
  for (int i = 0; i < block.size; i += kFloats) {
    const HardLogits hard = load_hard(preds, block, i, left_over[i / 64]);
    const uint32_t positive = greater_mask(hard.u, all_floats(0));
    const FloatPair e = exp_minus_pair(hard.distance);
    const FloatVec above = hard.u > 0.0f ? hard.u : all_floats(0), value = e.high + e.low, rest = log_rest(e, value);
    store_vec(losses + i, low_doubles(above) + (linear * low_doubles(e.high) + low_doubles(rest)));
    store_vec(losses + i + kDoubles, high_doubles(above) + (linear * high_doubles(e.high) + high_doubles(rest)));
    const FloatVec sigma = sigmoid_from_exp(positive, value, reciprocal_estimate(1 + value));
    const IntVec bin = bins_of(edges, hard.u, sigma);
    store_vec(bins + i, choose(hard.mask, bin, IntVec{} + edges.bins));
  }
  for (int i = 0; i < block.size; ++i) {
    GhmSums& own = sums[i % 4];
    own.loss[bins[i]] += losses[i];
    ++own.count[bins[i]];
  }
}

template <class In>
static void write_float(const In* preds, const GhmBlock& block, const GhmEdges& edges, const GhmFactors& factors,
                        uint64_t* left_over, In* gradient) {
  for (int i = 0; i < block.size; i += kFloats) {
    const HardLogits hard = load_hard(preds, block, i, left_over[i / 64]);
    const uint32_t positive = greater_mask(hard.u, all_floats(0));
    const FloatPair pair = exp_minus_pair(hard.distance);
    const FloatVec e = pair.high + pair.low, sigma = sigmoid_from_exp(positive, e, 1 / (1 + e));
    const FloatVec factor = look_up(factors.rounded, bins_of(edges, hard.u, sigma));
    store_some(gradient + i, choose(hard.mask, negate_where(hard.one, sigma * factor), FloatVec{}), block.size - i);
  }
}

static void start_sums(const GhmEdges& edges, GhmSums* sums, int copies) {
  for (int copy = 0; copy < copies; ++copy) {
    sums[copy].nan_count = 0;
    for (int bin = 0; bin <= edges.bins; ++bin) sums[copy].loss[bin] = 0;
    for (int bin = 0; bin <= edges.bins; ++bin) sums[copy].count[bin] = 0;
  }
}

static uint64_t any_bit(const uint64_t* words) {
  uint64_t bits = 0;
  for (int word = 0; word < kBlockWords; ++word) bits |= words[word];
  return bits;
}

// preds: of the level's dtype. Adds elements [begin, end) of the level to nothing: `sums` is set.
template <bool kRegression, class In>
static void sum_chunk(const GhmLevel& level, const In* preds, int64_t begin, int64_t end, const GhmEdges& edges,
                      GhmSums& sums) {
  constexpr bool kHasFloatPath = !kRegression && sizeof(In) <= 4;
  GhmBlock block;
  WideElements wide;
  GhmSums copies[4];
  start_sums(edges, copies, 4);
  for (; begin < end; begin += kBlock) {
    fill_block<kRegression>(level, begin, end, block);
    const uint64_t* wanted = block.valid;
    uint64_t left_over[kBlockWords] = {};
    if constexpr (kHasFloatPath) {
      add_float(preds + begin, block, edges, left_over, copies);
      wanted = left_over;
    }
    if (any_bit(wanted) != 0) add_wide<kRegression>(preds + begin, block, wanted, edges, wide, copies[0]);
  }
  sums.nan_count = copies[0].nan_count;
  for (int bin = 0; bin < edges.bins; ++bin) {
    sums.loss[bin] = (copies[0].loss[bin] + copies[1].loss[bin]) + (copies[2].loss[bin] + copies[3].loss[bin]);
    sums.count[bin] = copies[0].count[bin] + copies[1].count[bin] + copies[2].count[bin] + copies[3].count[bin];
  }
}

// gradient: as preds.
template <bool kRegression, class In>
static void write_chunk(const GhmLevel& level, const In* preds, int64_t begin, int64_t end, const GhmEdges& edges,
                        const GhmFactors& factors, In* gradient) {
  constexpr bool kHasFloatPath = !kRegression && sizeof(In) <= 4;
  GhmBlock block;
  WideElements wide;
  for (; begin < end; begin += kBlock) {
    fill_block<kRegression>(level, begin, end, block);
    const uint64_t* wanted = block.valid;
    uint64_t left_over[kBlockWords] = {};
    if constexpr (kHasFloatPath) {
      write_float(preds + begin, block, edges, factors, left_over, gradient + begin);
      wanted = left_over;
    } else {
      for (int i = 0; i < block.size; ++i) gradient[begin + i] = In(Arithmetic<In>(0));
    }
    if (any_bit(wanted) != 0) write_wide<kRegression>(preds + begin, block, wanted, edges, factors, wide, gradient + begin);
  }
}
