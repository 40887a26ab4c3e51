// Regression in vectors of floats: predictions and targets that are float32 or narrower. Part of ghm_simd.h.
// With x = |d| / mu and y = x^2: g = x / sqrt(1 + y), and l = mu f where f^2 + 2 f = y. What lies beyond the range in which
// floats of these are good, NaN included, is left over for the float64 path.

// Where float64 changes over to the other formulas. y is far from the end of the range of float.
constexpr float kLargestFloatRatio = 1e9f;

struct RegressionVec {
  FloatVec ratio;  // d / mu
  FloatVec square;
  FloatVec inverse_root;  // 1 / sqrt(1 + y), to 14 bits
  IntVec bin;
  uint32_t mask;  // the elements taken
};

// The number of thresholds at or below |d|. A difference rounded to float decides as the exact one does, unless it is a
// neighbour of the threshold.
template <int kTable, class In, class Target>
static inline IntVec regression_bins(const GhmEdges& edges, const In* preds, const Target* targets, FloatVec d, FloatVec g) {
  const IntVec lowest = truncate(g * scale_of_lowest(edges));
  const IntVec beyond =
      reinterpret_cast<IntVec>(absolute(d)) - reinterpret_cast<IntVec>(look_up<kTable>(edges.float_above, lowest));
  uint32_t above = ~negative_mask(beyond);
  for (uint32_t close = zero_mask((beyond + 1) & ~1); __builtin_expect(close != 0, 0); close &= close - 1) {
    const int lane = __builtin_ctz(close);
    const double distance = static_cast<double>(widen(preds[lane])) - static_cast<double>(widen(targets[lane]));
    const bool is_above = (distance < 0 ? -distance : distance) >= edges.above[lowest[lane]];
    above = is_above ? above | 1u << lane : above & ~(1u << lane);
  }
  return add_one_where(above, lowest);
}

template <int kTable, class In, class Target>
static inline RegressionVec load_regression(const In* preds, const Target* targets, const GhmBlock& block,
                                            const GhmEdges& edges, int i, uint64_t& left_over) {
  const uint32_t valid = static_cast<uint32_t>(block.valid[i / 64] >> i % 64) & kAllFloats;
  const FloatVec d = load_floats(preds + i) - load_floats(targets + i);
  const FloatVec any_ratio = d * all_floats(static_cast<float>(1 / edges.mu));
  const uint32_t is_near = at_most_mask(absolute(any_ratio), all_floats(kLargestFloatRatio)), mask = valid & is_near;
  left_over |= static_cast<uint64_t>(valid & ~mask) << i % 64;
  const FloatVec ratio = choose(is_near, any_ratio, FloatVec{}), square = ratio * ratio;
  const FloatVec inverse_root = reciprocal_root_estimate(1 + square);
  const IntVec bin = regression_bins<kTable>(edges, preds + i, targets + i, d, absolute(ratio) * inverse_root);
  return {ratio, square, inverse_root, bin, mask};
}

// mu f by a step of Newton's from `guess`, f to 13 bits. slope: -1 / (2 sqrt(1 + y)), to 14 bits. Right to 2e-8.
static inline DoubleVec regression_loss(DoubleVec d, DoubleVec guess, DoubleVec slope, double mu, double inverse_mu) {
  const DoubleVec scaled_guess = guess * mu;
  return scaled_guess + (scaled_guess * (guess + 2) - d * (d * inverse_mu)) * slope;
}

template <int kTable, class In, class Target>
static void add_regression(const In* preds, const Target* targets, const GhmBlock& block, const GhmEdges& edges,
                           uint64_t* left_over, BinSum* sums) {
  alignas(64) double losses[kBlock];
  alignas(64) int32_t entries[kBlock];
  const double mu = edges.mu, inverse_mu = 1 / mu;
  for (int i = 0; i < block.size; i += kFloats) {
    const RegressionVec x = load_regression<kTable>(preds, targets, block, edges, i, left_over[i / 64]);
    const FloatVec pred = load_floats(preds + i), target = load_floats(targets + i), slope = -0.5f * x.inverse_root;
    const FloatVec guess = x.square * rough_reciprocal(1 + (1 + x.square) * x.inverse_root);
    const DoubleVec low = low_doubles(pred) - low_doubles(target), high = high_doubles(pred) - high_doubles(target);
    store_vec(losses + i, regression_loss(low, low_doubles(guess), low_doubles(slope), mu, inverse_mu));
    store_vec(losses + i + kDoubles, regression_loss(high, high_doubles(guess), high_doubles(slope), mu, inverse_mu));
    store_vec(entries + i, entries_of(choose(x.mask, x.bin, IntVec{} + edges.bins)));
  }
  add_to_entries(losses, entries, block.size, sums);
}

template <int kTable, class In, class Target>
static void write_regression(const In* preds, const Target* targets, const GhmBlock& block, const GhmEdges& edges,
                             const GhmFactors& factors, uint64_t* left_over, In* gradient) {
  for (int i = 0; i < block.size; i += kFloats) {
    const RegressionVec x = load_regression<kTable>(preds, targets, block, edges, i, left_over[i / 64]);
    const FloatVec inverse_root = x.inverse_root * (1.5f - 0.5f * (1 + x.square) * x.inverse_root * x.inverse_root);
    const FloatVec factor = look_up<kTable>(factors.rounded, x.bin);
    store_floats(gradient + i, choose(x.mask, x.ratio * inverse_root * factor, FloatVec{}));
  }
}
