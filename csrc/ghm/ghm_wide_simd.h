// Elements in float64: soft targets, and what is float64 or beyond the float paths. Part of ghm_simd.h.

// log(1 + e) for e in [0, 1], by the series of 2 artanh(e / (2 + e)).
static inline DoubleVec log_one_plus(DoubleVec e) {
  const DoubleVec s = e / (2 + e), square = s * s;
  DoubleVec sum = all_doubles(1 / 31.0);
  for (int k = 29; k >= 3; k -= 2) sum = sum * square + 1.0 / k;
  return 2 * (s + s * (square * sum));
}

// Elements picked from a block, and what was computed of them.
struct WideElements {
  int count;
  alignas(64) double pred[kBlock + kDoubles];
  alignas(64) double target[kBlock + kDoubles];
  alignas(64) double loss[kBlock + kDoubles];
  alignas(64) double slope[kBlock + kDoubles];
  alignas(64) double position[kBlock + kDoubles];
  alignas(64) int32_t edge[kBlock + kDoubles];  // kind and lowest bin that may be the element's
  int16_t at[kBlock];                           // in the block
};

template <class In>
static inline void pick_word(const In* preds, const double* targets, WideElements& wide, int word) {
  for (int i = word * 64; i < word * 64 + 64; i += kFloats) {
    const FloatVec z = load_floats(preds + i);
    store_vec(wide.pred + wide.count, low_doubles(z));
    store_vec(wide.pred + wide.count + kDoubles, high_doubles(z));
    __builtin_memcpy(wide.target + wide.count, targets + i, kFloats * sizeof(double));
    for (int lane = 0; lane < kFloats; ++lane) wide.at[wide.count + lane] = static_cast<int16_t>(i + lane);
    wide.count += kFloats;
  }
}

template <class In>
static void pick_elements(const In* preds, const GhmBlock& block, const uint64_t* wanted, WideElements& wide) {
  wide.count = 0;
  for (int word = 0; word < kBlockWords; ++word) {
    if constexpr (sizeof(In) <= 4) {
      if (wanted[word] == ~uint64_t{0} && block.soft[word] == ~uint64_t{0}) {
        pick_word(preds, block.target, wide, word);
        continue;
      }
    }
    for (uint64_t bits = wanted[word]; bits != 0; bits &= bits - 1) {
      const int bit = __builtin_ctzll(bits), i = word * 64 + bit;
      wide.at[wide.count] = static_cast<int16_t>(i);
      wide.pred[wide.count] = static_cast<double>(widen(preds[i]));
      wide.target[wide.count] = block.soft[word] >> bit & 1 ? block.target[i] : static_cast<double>(block.one[word] >> bit & 1);
      ++wide.count;
    }
  }
  for (int i = 0; i < kDoubles; ++i) wide.pred[wide.count + i] = wide.target[wide.count + i] = 0;
}

typedef int32_t HalfIntVec __attribute__((vector_size(4 * kDoubles)));

// The bin of an element is the lowest of these or the next one: g may be wrong by far less than a bin.
static inline HalfIntVec lowest_bins(const GhmEdges& edges, DoubleVec g) {
  const DoubleVec scaled = g * (edges.bins * (1 - 0x1p-20)), last = all_doubles(edges.bins - 1);
  const DoubleVec at_most_last = scaled < last ? scaled : last;
  return __builtin_convertvector(at_most_last > 0.0 ? at_most_last : all_doubles(0), HalfIntVec);
}

template <bool kNeedsLoss>
static void classify_wide(const GhmEdges& edges, WideElements& wide) {
  for (int i = 0; i < wide.count; i += kDoubles) {
    const DoubleVec z = load_vec<DoubleVec>(wide.pred + i), t = load_vec<DoubleVec>(wide.target + i);
    const DoubleVec distance = absolute(z), e = exp_minus(distance);
    const DoubleVec factor = (z > 0.0 ? 1 - t : t) + 0 * t;  // NaN of an infinite target
    const DoubleVec slope = e / (1 + e) - factor, g = absolute(slope);
    const LongVec is_one = t == 1.0, is_hard = is_one | (t == 0.0);
    if constexpr (kNeedsLoss) store_vec(wide.loss + i, (factor == 0.0 ? all_doubles(0) : factor * distance) + log_one_plus(e));
    else store_vec(wide.slope + i, z > 0.0 ? -slope : slope);
    store_vec(wide.position + i, is_hard ? (is_one ? -z : z) : g);
    store_vec(wide.edge + i, lowest_bins(edges, g) + __builtin_convertvector(is_hard & kMostBins, HalfIntVec));
  }
}

template <bool kNeedsLoss>
static void regress_wide(const GhmEdges& edges, WideElements& wide) {
  const double mu = edges.mu;
  for (int i = 0; i < wide.count; i += kDoubles) {
    const DoubleVec d = load_vec<DoubleVec>(wide.pred + i) - load_vec<DoubleVec>(wide.target + i);
    const DoubleVec distance = absolute(d), sign = d > 0.0 ? all_doubles(1) : all_doubles(-1);
    const DoubleVec root = square_root(d * d + mu * mu);
    const LongVec is_far = distance > 1e9 * mu;
    const DoubleVec slope = is_far ? sign : d / root;
    if constexpr (kNeedsLoss) store_vec(wide.loss + i, is_far ? distance - mu : distance * (distance / (root + mu)));
    else store_vec(wide.slope + i, slope);
    store_vec(wide.position + i, distance);
    store_vec(wide.edge + i, lowest_bins(edges, absolute(slope)));
  }
}

static inline int bin_of_wide(const GhmEdges& edges, const WideElements& wide, int i) {
  const int lowest = wide.edge[i] % kMostBins;
  return lowest + (wide.position[i] >= edges.above[wide.edge[i]] ? 1 : 0);
}

template <bool kRegression, bool kNeedsLoss, class In>
static void compute_wide(const In* preds, const GhmBlock& block, const uint64_t* wanted, const GhmEdges& edges,
                         WideElements& wide) {
  pick_elements(preds, block, wanted, wide);
  if constexpr (kRegression) regress_wide<kNeedsLoss>(edges, wide);
  else classify_wide<kNeedsLoss>(edges, wide);
}

template <bool kRegression, class In>
static void add_wide(const In* preds, const GhmBlock& block, const uint64_t* wanted, const GhmEdges& edges, WideElements& wide,
                     GhmSums& sums) {
  compute_wide<kRegression, true>(preds, block, wanted, edges, wide);
  for (int i = 0; i < wide.count; ++i) {
    const double loss = wide.loss[i];
    if (__builtin_expect(loss != loss, 0)) ++sums.nan_count;
    else sums.bins[kCopies * bin_of_wide(edges, wide, i) + i % kCopies] += BinSum{loss, 1};
  }
}

template <bool kRegression, class In>
static void write_wide(const In* preds, const GhmBlock& block, const uint64_t* wanted, const GhmEdges& edges,
                       const GhmFactors& factors, WideElements& wide, In* gradient) {
  compute_wide<kRegression, false>(preds, block, wanted, edges, wide);
  for (int i = 0; i < wide.count; ++i) {
    const double slope = wide.slope[i];
    // NaN is the element's alone, whatever the factor of its bin.
    const double value = slope != slope ? slope : factors.exact[bin_of_wide(edges, wide, i)] * slope;
    gradient[wide.at[i]] = In(static_cast<Arithmetic<In>>(value));
  }
}
