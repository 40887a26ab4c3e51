// Chunks of a level -> counts and losses by bin, or gradients. Compiled once per instruction set (common/for_each_isa.h).
// A block of elements at a time: targets and weights become bit masks (ghm_masks_simd.h); float logits with targets 0 or 1 take
// the float path here, regression in float that of ghm_regression_simd.h, everything else the float64 one (ghm_wide_simd.h).
#include "common/vectors_simd.h"
#include "ghm/ghm_masks_simd.h"
#include "ghm/ghm_wide_simd.h"

// Beyond it e^-|u| may leave the normal range of float.
constexpr float kLargestFloatLogit = 86;

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

// e^u for u in [-86, 0] as 2^(n/16) e^r.
static inline FloatPair exp_pair(FloatVec u) {
  const FloatVec shifted = u * 23.0831207f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  // The first product and difference are exact.
  const FloatVec r = (u - n * 0x1.62ep-5f) - n * 1.99663656e-6f;
  const IntVec bits = reinterpret_cast<IntVec>(shifted), at = RSL_ISA == 0 ? bits & 15 : bits;
  const FloatVec lost = look_up<kSixteenthsVectors>(kLostOfSixteenths, at);
  // Unsigned: of an element that the caller drops the sum may overflow.
  const UnsignedVec power =
      reinterpret_cast<UnsignedVec>(look_up<kSixteenthsVectors>(kSixteenths, at)) + (reinterpret_cast<UnsignedVec>(bits) << 19);
  const FloatVec high = reinterpret_cast<FloatVec>(power);
  return {high, high * (r * r * (0.166670248f * r + 0.500016212f) + (r + lost))};
}

// log(1 + e) = parabola_of(e.high) + rest: the first in float64, and the rounding of `rest`, 3 % of the sum at most, hardly
// matters. The polynomial is around 1/2, where its terms are small.
constexpr float kLinear = 0.96875f, kSquare = -0.28125f;

static inline DoubleVec parabola_of(DoubleVec e) { return e * (e * kSquare + kLinear); }

static inline FloatVec log_rest(FloatPair e, FloatVec value) {
  const float coefficients[] = {5.253480661441e-3f,   -6.696555668202e-3f, 1.1576084014607e-2f,
                                -2.0580299566167e-2f, 3.663548351807e-2f,  -6.7687004098161e-2f,
                                0.13260900336731f,    -7.27712350893e-3f,  -1.7194779990197e-2f};
  const FloatVec x = (e.high - 0.5f) + e.low;
  FloatVec sum = all_floats(-3.338880246387e-3f);
  for (const float coefficient : coefficients) sum = sum * x + coefficient;
  return value * sum + ((e.high + value) * kSquare + kLinear) * e.low;
}

static inline FloatVec sigmoid_from_exp(uint32_t positive, FloatVec e, FloatVec reciprocal) {
  return choose(positive, reciprocal, e * reciprocal);
}

// sigma may be wrong by 4e-4 of itself, which is less than a bin: one comparison decides.
template <int kTable>
static inline IntVec bins_of(const GhmEdges& edges, FloatVec scale, FloatVec u, FloatVec sigma) {
  const IntVec lowest = truncate(sigma * scale);
  return add_one_where(at_most_mask(look_up<kTable>(edges.float_above, lowest), u), lowest);
}

static inline FloatVec scale_of_lowest(const GhmEdges& edges) {
  return all_floats(static_cast<float>(edges.bins) * (1 - 0x1p-10f));
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
  const FloatVec z = load_floats(preds + i), distance = absolute(z), limit = all_floats(kLargestFloatLogit);
  const uint32_t is_small = at_most_mask(distance, limit), mask = valid & ~soft & is_small;
  left_over |= static_cast<uint64_t>(valid & ~mask) << shift;
  return {negate_where(one, z), choose(is_small, distance, limit), one, mask};
}

static inline double sum_lanes(DoubleVec x) {
  double sum = 0;
  for (int lane = 0; lane < kDoubles; ++lane) sum += x[lane];
  return sum;
}

// Below it, which is u < -log 9, or where the first bin ends before: log(1 + e) = e + e^2 p(e) of degree 3, right to 6e-9.
static inline float largest_easy_logit(const GhmEdges& edges) {
  constexpr float kLimit = -2.1972246f;
  return edges.float_above[0] < kLimit ? edges.float_above[0] : kLimit;
}

// Sums the easy elements of the first bin, most of a detector's, in registers, and gathers the u of the others that are within
// float. Returns how many those are.
template <class In>
static int add_easy(const In* preds, const GhmBlock& block, const GhmEdges& edges, uint64_t* left_over, float* others,
                    BinSum& sum) {
  const FloatVec limit = all_floats(largest_easy_logit(edges)), farthest = all_floats(kLargestFloatLogit);
  DoubleVec low_sum{}, high_sum{}, rest_sum{};
  int count = 0, filled = 0;
  for (int word = 0; word * 64 < block.size; ++word) {
    const uint64_t hard = block.valid[word] & ~block.soft[word];
    uint64_t within = 0;
    FloatVec rest{};
    for (int shift = 0; shift < 64; shift += kFloats) {
      const uint32_t one = static_cast<uint32_t>(block.one[word] >> shift) & kAllFloats;
      const FloatVec z = load_floats(preds + word * 64 + shift), u = negate_where(one, z);
      const uint32_t fits = static_cast<uint32_t>(hard >> shift) & at_most_mask(absolute(z), farthest);
      const uint32_t easy = fits & greater_mask(limit, u);
      const FloatPair e = exp_pair(u);
      const FloatVec value = e.high + e.low, high = choose(easy, e.high, FloatVec{});
      const FloatVec terms = ((0.161001831f * value - 0.246539742f) * value + 0.333209336f) * value - 0.499998599f;
      rest += choose(easy, value * value * terms + e.low, FloatVec{});
      low_sum += low_doubles(high);
      high_sum += high_doubles(high);
      count += __builtin_popcount(easy);
      filled += store_picked(fits & ~easy, u, others + filled);
      within |= static_cast<uint64_t>(fits) << shift;
    }
    rest_sum += low_doubles(rest) + high_doubles(rest);
    left_over[word] = block.valid[word] & ~within;
  }
  sum += BinSum{sum_lanes(low_sum + high_sum) + sum_lanes(rest_sum), static_cast<double>(count)};
  return filled;
}

// The entries of the sums that elements in turn add to.
static inline IntVec entries_of(IntVec bins) {
  IntVec turn;
  for (int lane = 0; lane < kFloats; ++lane) turn[lane] = lane % kCopies;
  return bins * kCopies + turn;
}

// Apart from the loops that compute both: what was stored in vectors just before is slow to load element by element.
static void add_to_entries(const double* losses, const int32_t* entries, int count, BinSum* sums) {
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) sums[entries[i]] += BinSum{losses[i], 1};
}

// u has room for whole vectors.
template <int kTable>
static void add_others(float* u, int count, const GhmEdges& edges, BinSum* sums) {
  alignas(64) double losses[kBlock];
  alignas(64) int32_t entries[kBlock];
  store_floats(u + count, FloatVec{});
  const FloatVec scale = scale_of_lowest(edges);
  for (int i = 0; i < count; i += kFloats) {
    const FloatVec logit = load_floats(u + i);
    const uint32_t positive = greater_mask(logit, all_floats(0));
    const FloatPair e = exp_pair(-absolute(logit));
    const FloatVec value = e.high + e.low, rest = log_rest(e, value), above = choose(positive, logit, FloatVec{});
    store_vec(losses + i, (parabola_of(low_doubles(e.high)) + low_doubles(rest)) + low_doubles(above));
    store_vec(losses + i + kDoubles, (parabola_of(high_doubles(e.high)) + high_doubles(rest)) + high_doubles(above));
    const FloatVec sigma = sigmoid_from_exp(positive, value, reciprocal_estimate(1 + value));
    store_vec(entries + i, entries_of(bins_of<kTable>(edges, scale, logit, sigma)));
  }
  add_to_entries(losses, entries, count, sums);
}

template <int kTable, class In>
static void add_float(const In* preds, const GhmBlock& block, const GhmEdges& edges, uint64_t* left_over, BinSum* sums) {
  alignas(64) float others[kBlock + kFloats];
  const int count = add_easy(preds, block, edges, left_over, others, sums[0]);
  add_others<kTable>(others, count, edges, sums);
}

// e^-x for x in [0, 86], right to 4e-7: enough for a gradient.
static inline FloatVec exp_minus(FloatVec x) {
  const FloatVec shifted = x * -1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f, r = -x - n * 0.693147181f;
  const float coefficients[] = {8.368887645837e-3f, 4.1666205857511e-2f, 0.16666518853765f, 0.5000000095168f, 1, 1};
  FloatVec sum = all_floats(1.39504874814332e-3f);
  for (const float coefficient : coefficients) sum = sum * r + coefficient;
  return reinterpret_cast<FloatVec>(reinterpret_cast<IntVec>(sum) + (reinterpret_cast<IntVec>(shifted) << 23));
}

// gradient has room for whole vectors.
template <int kTable, class In>
static void write_float(const In* preds, const GhmBlock& block, const GhmEdges& edges, const GhmFactors& factors,
                        uint64_t* left_over, In* gradient) {
  const FloatVec scale = scale_of_lowest(edges);
  for (int i = 0; i < block.size; i += kFloats) {
    const HardLogits hard = load_hard(preds, block, i, left_over[i / 64]);
    const uint32_t positive = greater_mask(hard.u, all_floats(0));
    const FloatVec e = exp_minus(hard.distance), sigma = sigmoid_from_exp(positive, e, reciprocal(1 + e));
    const FloatVec factor = look_up<kTable>(factors.rounded, bins_of<kTable>(edges, scale, hard.u, sigma));
    store_floats(gradient + i, choose(hard.mask, negate_where(hard.one, sigma * factor), FloatVec{}));
  }
}

#include "ghm/ghm_regression_simd.h"

template <bool kRegression, class In>
constexpr bool has_float_path() {
  return !kRegression && sizeof(In) <= 4;
}

static uint64_t any_bit(const uint64_t* words) {
  uint64_t bits = 0;
  for (int word = 0; word < kBlockWords; ++word) bits |= words[word];
  return bits;
}

// Calls body(number of vectors for look_up, regression targets of the block) for the float path of the block, the targets
// nullptr for GHM-C. False: there is none, as something is float64.
template <bool kRegression, class In, class Body>
static bool with_float_path(const GhmLevel& level, const GhmBlock& block, int bins, const Body& body) {
  bool is_done = false;
  if constexpr (sizeof(In) <= 4) {
    with_table_vectors(bins, [&](auto table) {
      if constexpr (!kRegression) {
        body(table, nullptr);
        is_done = true;
      } else {
        dispatch_floating(level.target_type, [&](auto tag) {
          using Target = decltype(tag);
          if constexpr (sizeof(Target) <= 4) {
            Target padded[kBlock];
            const Target* targets = static_cast<const Target*>(level.targets) + block.begin;
            body(table, block.size < kBlock ? pad_block(targets, block.size, padded) : targets);
            is_done = true;
          }
        });
      }
    });
  }
  return is_done;
}

// preds: of the level's dtype. result: loss and count by bin of the elements [begin, end) of the level. Returns how many of the
// valid ones hold NaN.
template <bool kRegression, class In>
static int64_t sum_chunk(const GhmLevel& level, const In* preds, int64_t begin, int64_t end, const GhmEdges& edges,
                         BinSum* result) {
  GhmBlock block;
  In padded[kBlock];
  WideElements wide;
  GhmSums sums;
  sums.nan_count = 0;
  for (int i = 0; i < kCopies * (edges.bins + 1); ++i) sums.bins[i] = BinSum{};
  for (; begin < end; begin += kBlock) {
    fill_block<kRegression>(level, begin, end, block);
    const In* data = preds + begin;
    if (block.size < kBlock) data = pad_block(data, block.size, padded);
    uint64_t left_over[kBlockWords] = {};
    const bool has_floats = with_float_path<kRegression, In>(level, block, edges.bins, [&](auto table, auto targets) {
      if constexpr (kRegression) add_regression<decltype(table)::value>(data, targets, block, edges, left_over, sums.bins);
      else add_float<decltype(table)::value>(data, block, edges, left_over, sums.bins);
    });
    const uint64_t* wanted = has_floats ? left_over : block.valid;
    if (any_bit(wanted) == 0) continue;
    if constexpr (kRegression) fill_targets<true>(level, block);
    add_wide<kRegression>(data, block, wanted, edges, wide, sums);
  }
  for (int bin = 0; bin < edges.bins; ++bin) {
    const BinSum* copies = sums.bins + kCopies * bin;
    result[bin] = (copies[0] + copies[1]) + (copies[2] + copies[3]) + ((copies[4] + copies[5]) + (copies[6] + copies[7]));
  }
  return sums.nan_count;
}

// gradient: as preds.
template <bool kRegression, class In>
static void write_chunk(const GhmLevel& level, const In* preds, int64_t begin, int64_t end, const GhmEdges& edges,
                        const GhmFactors& factors, In* gradient) {
  GhmBlock block;
  In padded[kBlock], padded_output[kBlock];
  WideElements wide;
  for (; begin < end; begin += kBlock) {
    fill_block<kRegression>(level, begin, end, block);
    const In* data = preds + begin;
    if (block.size < kBlock) data = pad_block(data, block.size, padded);
    In* output = block.size < kBlock ? padded_output : gradient + begin;
    uint64_t left_over[kBlockWords] = {};
    const bool has_floats = with_float_path<kRegression, In>(level, block, edges.bins, [&](auto table, auto targets) {
      constexpr int kTable = decltype(table)::value;
      if constexpr (kRegression) write_regression<kTable>(data, targets, block, edges, factors, left_over, output);
      else write_float<kTable>(data, block, edges, factors, left_over, output);
    });
    if (!has_floats)
      for (int i = 0; i < block.size; ++i) output[i] = In(Arithmetic<In>(0));
    const uint64_t* wanted = has_floats ? left_over : block.valid;
    if (any_bit(wanted) != 0) {
      if constexpr (kRegression) fill_targets<true>(level, block);
      write_wide<kRegression>(data, block, wanted, edges, factors, wide, output);
    }
    if (block.size < kBlock) __builtin_memcpy(gradient + begin, output, static_cast<size_t>(block.size) * sizeof(In));
  }
}
