// Chunks of a level -> counts and losses by bin, or gradients. Compiled once per instruction set (common/for_each_isa.h).
// A block of elements at a time: targets and weights become masks (ghm_masks_simd.h); float logits with targets 0 or 1 take the
// float path of ghm_classification_simd.h, regression in float that of ghm_regression_simd.h, everything else the float64 one
// (ghm_wide_simd.h).
#include "common/vectors_simd.h"
// After the vectors.
#include "common/exponentials_simd.h"
#include "ghm/ghm_masks_simd.h"
// After the masks.
#include "ghm/ghm_classification_simd.h"
#include "ghm/ghm_regression_simd.h"
#include "ghm/ghm_wide_simd.h"

static bool any_bit(const uint64_t* words) {
  uint64_t bits = 0;
  for (int word = 0; word < kBlockWords; ++word) bits |= words[word];
  return bits != 0;
}

// Calls body(number of vectors for look_up, targets of the block) where both sides are narrower than float64; else false.
template <class In, class Body>
static bool with_float_targets(const GhmLevel& level, const GhmBlock& block, int bins, const Body& body) {
  bool is_done = false;
  if constexpr (sizeof(In) <= 4) {
    dispatch_floating(level.target_type, [&](auto tag) {
      using Target = decltype(tag);
      if constexpr (sizeof(Target) <= 4) {
        Target padded[kBlock];
        const Target* targets = static_cast<const Target*>(level.targets) + block.begin;
        if (block.size < kBlock) targets = pad_block(targets, block.size, padded);
        with_table_vectors(bins, [&](auto table) { body(table, targets); });
        is_done = true;
      }
    });
  }
  return is_done;
}

// Calls body(masks) for a block of GHM-C, which returns whether valid elements are left over. Then, or where the targets and
// weights cannot be read with the logits, their bits are in the block.
template <class Body>
static bool with_masks(const GhmLevel& level, GhmBlock& block, const Body& body) {
  const bool is_dense = block.size == kBlock && has_dense_masks(level);
  const bool any_left = is_dense && body(DenseMasks(level, block.begin));
  if (is_dense && !any_left) return false;
  fill_masks(level, block);
  return is_dense || body(WordMasks{block});
}

// Takes all valid elements: there is no float path.
static bool want_all(const GhmBlock& block, uint64_t* wanted) {
  uint64_t any = 0;
  for (int word = 0; word < kBlockWords; ++word) any |= wanted[word] = block.valid[word];
  return any != 0;
}

// Adds what the float path can. wanted: the other valid elements. Returns whether there are any.
template <bool kRegression, class In>
static bool add_floats(const GhmLevel& level, const In* preds, const GhmEdges& edges, GhmBlock& block, OtherLogits& others,
                       BinSum* sums, uint64_t* wanted) {
  if constexpr (kRegression) {
    fill_valid(level, block);
    const bool is_done = with_float_targets<In>(level, block, edges.bins, [&](auto table, const auto* targets) {
      add_regression<decltype(table)::value>(preds, targets, block, edges, wanted, sums);
    });
    if (is_done) return any_bit(wanted);
  } else if constexpr (sizeof(In) <= 4) {
    const bool any_left =
        with_masks(level, block, [&](const auto& masks) { return add_easy(preds, block.size, masks, edges, others, sums[0]); });
    if (others.count > kBlock) add_others(others, edges, sums);
    if (any_left) find_left_over(preds, block, wanted);
    return any_left;
  } else {
    fill_masks(level, block);
  }
  return want_all(block, wanted);
}

// preds: of the level's dtype. result: loss and count by bin of the elements [begin, end) of the level. Returns how many of the
// valid ones hold NaN.
template <bool kRegression, class In>
static int64_t sum_chunk(const GhmLevel& level, const In* preds, int64_t begin, int64_t end, const GhmEdges& edges,
                         BinSum* result) {
  GhmBlock block;
  In padded[kBlock];
  OtherLogits others;
  WideElements wide;
  GhmSums sums;
  sums.nan_count = 0;
  for (int i = 0; i < kCopies * (edges.bins + 1); ++i) sums.bins[i] = BinSum{};
  for (; begin < end; begin += kBlock) {
    place_block(begin, end, block);
    const In* data = block.size < kBlock ? pad_block(preds + begin, block.size, padded) : preds + begin;
    uint64_t wanted[kBlockWords] = {};
    if (!add_floats<kRegression>(level, data, edges, block, others, sums.bins, wanted)) continue;
    if constexpr (kRegression) fill_regression(level, block);
    add_wide<kRegression>(data, block, wanted, edges, wide, sums);
  }
  add_others(others, edges, sums.bins);
  for (int bin = 0; bin < edges.bins; ++bin) {
    const BinSum* copies = sums.bins + kCopies * bin;
    result[bin] = (copies[0] + copies[1]) + (copies[2] + copies[3]) + ((copies[4] + copies[5]) + (copies[6] + copies[7]));
  }
  return sums.nan_count;
}

// As add_floats, with the gradient of what is not wanted, and zeros where there is no float path.
template <bool kRegression, class In>
static bool write_floats(const GhmLevel& level, const In* preds, const GhmEdges& edges, const GhmFactors& factors,
                         GhmBlock& block, In* gradient, uint64_t* wanted) {
  if constexpr (kRegression) {
    fill_valid(level, block);
    const bool is_done = with_float_targets<In>(level, block, edges.bins, [&](auto table, const auto* targets) {
      write_regression<decltype(table)::value>(preds, targets, block, edges, factors, wanted, gradient);
    });
    if (is_done) return any_bit(wanted);
  } else if constexpr (sizeof(In) <= 4) {
    bool any_left = false;
    with_table_vectors(edges.bins, [&](auto table) {
      any_left = with_masks(level, block, [&](const auto& masks) {
        return write_float<decltype(table)::value>(preds, block.size, masks, edges, factors, gradient);
      });
    });
    if (any_left) find_left_over(preds, block, wanted);
    return any_left;
  } else {
    fill_masks(level, block);
  }
  for (int i = 0; i < block.size; ++i) gradient[i] = In(Arithmetic<In>(0));
  return want_all(block, wanted);
}

// gradient: as preds.
template <bool kRegression, class In>
static void write_chunk(const GhmLevel& level, const In* preds, int64_t begin, int64_t end, const GhmEdges& edges,
                        const GhmFactors& factors, In* gradient) {
  GhmBlock block;
  In padded[kBlock], padded_output[kBlock];
  WideElements wide;
  for (; begin < end; begin += kBlock) {
    place_block(begin, end, block);
    const In* data = block.size < kBlock ? pad_block(preds + begin, block.size, padded) : preds + begin;
    In* output = block.size < kBlock ? padded_output : gradient + begin;
    uint64_t wanted[kBlockWords] = {};
    if (write_floats<kRegression>(level, data, edges, factors, block, output, wanted)) {
      if constexpr (kRegression) fill_regression(level, block);
      write_wide<kRegression>(data, block, wanted, edges, factors, wide, output);
    }
    if (block.size < kBlock) __builtin_memcpy(gradient + begin, output, static_cast<size_t>(block.size) * sizeof(In));
  }
}
