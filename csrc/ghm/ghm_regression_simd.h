// Regression in vectors of floats: predictions and targets that are float32 or narrower. Part of ghm_simd.h.
// With x = |d| / mu and y = x^2: g = x / sqrt(1 + y), and l = mu f where f^2 + 2 f = y. What lies beyond the range in which
// floats of these are good, NaN included, is left over for the float64 path.

// Where float64 changes over to the other formulas. y is far from the end of the range of float.
constexpr float kLargestFloatRatio = 1e9f;

struct RegressionVec {
  FloatVec d;
  FloatVec square;
  FloatVec inverse_root;  // 1 / sqrt(1 + y), to 14 bits; 1 where y underflows
  FloatVec norm;          // g, likewise
  IntVec bin;
  uint32_t is_near;  // which are within the range
};

// Read once: the compiler cannot tell that what is written leaves them as they are.
struct RegressionScales {
  FloatVec inverse_mu;
  FloatVec of_lowest;
  explicit RegressionScales(const GhmEdges& edges)
      : inverse_mu(all_floats(static_cast<float>(1 / edges.mu))), of_lowest(scale_of_lowest(edges)) {}
};

// Of the lanes of `close`, whose difference rounded to float does not decide: which are at or above the threshold behind
// `lowest`.
template <class In, class Target>
static uint32_t decide_exactly(uint32_t close, const In* preds, const Target* targets, const GhmEdges& edges, IntVec lowest) {
  int32_t bins[kFloats];
  store_vec(bins, lowest);
  uint32_t above = 0;
  for (; close != 0; close &= close - 1) {
    const int lane = __builtin_ctz(close);
    const double d = static_cast<double>(widen(preds[lane])) - static_cast<double>(widen(targets[lane]));
    const double distance = d < 0 ? -d : d, threshold = edges.above[bins[lane]];
    above |= static_cast<uint32_t>(distance >= threshold) << lane;
  }
  return above;
}

template <int kTable, class In, class Target>
static inline RegressionVec load_regression(const In* preds, const Target* targets, const GhmEdges& edges,
                                            const RegressionScales& scales) {
  const FloatVec d = load_floats(preds) - load_floats(targets), length = absolute(d), any_ratio = length * scales.inverse_mu;
  const uint32_t is_near = at_most_mask(any_ratio, all_floats(kLargestFloatRatio));
  // Tables in memory need an index within them; what those in registers give for other elements is dropped.
  const FloatVec ratio = kTable == 0 ? choose(is_near, any_ratio, FloatVec{}) : any_ratio, square = ratio * ratio;
  const FloatVec inverse_root = reciprocal_root_estimate(1 + square), norm = ratio * inverse_root;
  const IntVec lowest = truncate(norm * scales.of_lowest);
  // The number of thresholds at or below |d|. Rounded to float it decides as the exact one does, unless it is a neighbour of
  // the threshold.
  const FloatVec threshold = look_up<kTable>(edges.float_above, lowest);
  uint32_t above = at_most_mask(threshold, length);
  const uint32_t close = is_near & zero_mask((reinterpret_cast<IntVec>(length) - reinterpret_cast<IntVec>(threshold) + 1) & ~1);
  if (__builtin_expect(close != 0, 0)) above = (above & ~close) | decide_exactly(close, preds, targets, edges, lowest);
  return {d, square, inverse_root, norm, add_one_where(above, lowest), is_near};
}

// mu f by a step of Newton's from `guess`, f to 13 bits. slope: -1 / (2 sqrt(1 + y)), to 14 bits. Right to 2e-8.
static inline DoubleVec regression_loss(DoubleVec d, DoubleVec guess, DoubleVec slope, double mu, double inverse_mu) {
  const DoubleVec scaled_guess = guess * mu;
  return scaled_guess + (scaled_guess * (guess + 2) - d * (d * inverse_mu)) * slope;
}

// Calls body(i, which elements from i on are valid) for the vectors of a block, which returns those that are left over.
template <class Body>
static inline void for_valid(const GhmBlock& block, uint64_t* left_over, const Body& body) {
  for (int word = 0; word * 64 < block.size; ++word) {
    const uint64_t valid = block.valid[word];
    uint64_t left = 0;
    for (int shift = 0; shift < 64; shift += kFloats)
      left |= static_cast<uint64_t>(body(word * 64 + shift, static_cast<uint32_t>(valid >> shift) & kAllFloats)) << shift;
    left_over[word] = left;
  }
}

template <int kTable, class In, class Target>
static void add_regression(const In* preds, const Target* targets, const GhmBlock& block, const GhmEdges& edges,
                           uint64_t* left_over, BinSum* sums) {
  alignas(64) double losses[kBlock];
  alignas(64) int32_t entries[kBlock];
  const RegressionScales scales(edges);
  const double mu = edges.mu, inverse_mu = 1 / mu;
  // So far behind the stores of whole vectors elements are added, which would else be slow to load one by one.
  constexpr int kBehind = 64;
  const IntVec behind = IntVec{} + edges.bins;
  for_valid(block, left_over, [&](int i, uint32_t valid) {
    const RegressionVec x = load_regression<kTable>(preds + i, targets + i, edges, scales);
    const DoublePair pred = load_doubles(preds + i), target = load_doubles(targets + i);
    const FloatVec slope = -0.5f * x.inverse_root, guess = x.square * reciprocal_estimate(1 + (1 + x.square) * x.inverse_root);
    const DoubleVec low = pred.low - target.low, high = pred.high - target.high;
    store_vec(losses + i, regression_loss(low, low_doubles(guess), low_doubles(slope), mu, inverse_mu));
    store_vec(losses + i + kDoubles, regression_loss(high, high_doubles(guess), high_doubles(slope), mu, inverse_mu));
    store_vec(entries + i, entries_of(choose(valid & x.is_near, x.bin, behind)));
    if (i >= kBehind) add_to_entries(losses + i - kBehind, entries + i - kBehind, kFloats, sums);
    return valid & ~x.is_near;
  });
  const int added = (block.size - 1) / 64 * 64 + 64 - kBehind;
  add_to_entries(losses + added, entries + added, block.size - added, sums);
}

// x, negated where `sign` is negative.
static inline FloatVec with_sign_of(FloatVec sign, FloatVec x) {
  constexpr int32_t kSignBit = static_cast<int32_t>(0x80000000);
  return reinterpret_cast<FloatVec>(reinterpret_cast<IntVec>(x) ^ (reinterpret_cast<IntVec>(sign) & kSignBit));
}

template <int kTable, class In, class Target>
static void write_regression(const In* preds, const Target* targets, const GhmBlock& block, const GhmEdges& edges,
                             const GhmFactors& factors, uint64_t* left_over, In* gradient) {
  const RegressionScales scales(edges);
  for_valid(block, left_over, [&](int i, uint32_t valid) {
    const RegressionVec x = load_regression<kTable>(preds + i, targets + i, edges, scales);
    // A step of Newton's for the root; then the sign of d.
    const FloatVec step = 1.5f - (1 + x.square) * x.inverse_root * (0.5f * x.inverse_root);
    const FloatVec slope = x.norm * step * look_up<kTable>(factors.rounded, x.bin);
    store_floats(gradient + i, choose(valid & x.is_near, with_sign_of(x.d, slope), FloatVec{}));
    return valid & ~x.is_near;
  });
}
