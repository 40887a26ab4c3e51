// Classification in vectors of floats: float32 or narrower logits with targets 0 or 1. Part of ghm_simd.h.
// The losses are right to 2e-8 before they are summed, the gradients to 4e-7. What lies beyond the range in which floats are
// that good, NaN and soft targets included, is left over for the float64 path.

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

// scaled: scale_of_lowest times sigma, which may be wrong by 4e-4 of itself. That is less than a bin: one comparison decides.
template <int kTable>
static inline IntVec bins_of(const GhmEdges& edges, FloatVec u, FloatVec scaled) {
  const IntVec lowest = truncate(scaled);
  return add_one_where(at_most_mask(look_up<kTable>(edges.float_above, lowest), u), lowest);
}

static inline FloatVec scale_of_lowest(const GhmEdges& edges) {
  return all_floats(static_cast<float>(edges.bins) * (1 - 0x1p-10f));
}

// Below it, which is u < -log 9, or where the first bin ends before: log(1 + e) = e + e^2 p(e) of degree 3, right to 6e-9.
static inline float largest_easy_logit(const GhmEdges& edges) {
  constexpr float kLimit = -2.1972246f;
  return edges.float_above[0] < kLimit ? edges.float_above[0] : kLimit;
}

// What is left of the float elements once the easy ones are summed, of several blocks, and room for whole vectors.
struct OtherLogits {
  int count = 0;
  alignas(64) float u[2 * kBlock + kFloats];
};

// Sums the easy elements of the first bin, most of a detector's, in registers, and gathers the u of the others that are within
// float. masks_at(i): VectorMasks of the elements from i on. Returns whether there are valid elements which are neither.
template <class In, class Masks>
static bool add_easy(const In* preds, int size, const Masks& masks_at, const GhmEdges& edges, OtherLogits& others,
                     BinSum& sum) {
  const FloatVec limit = all_floats(largest_easy_logit(edges)), farthest = all_floats(kLargestFloatExponent);
  DoubleVec low_sum{}, high_sum{}, rest_sum{};
  uint32_t left = 0;
  int count = 0, filled = others.count;
  for (int word = 0; word * 64 < size; ++word) {
    FloatVec rest{};
    for (int shift = 0; shift < 64; shift += kFloats) {
      const int i = word * 64 + shift;
      const VectorMasks masks = masks_at(i);
      const FloatVec z = load_floats(preds + i), u = negate_where(masks.one, z);
      const uint32_t fits = masks.valid & masks.hard & at_most_mask(absolute(z), farthest);
      const uint32_t easy = fits & greater_mask(limit, u);
      const FloatPair e = exp_pair(u);
      const FloatVec value = e.high + e.low, square = value * value, high = choose(easy, e.high, FloatVec{});
      const FloatVec terms = (0.161001831f * value - 0.246539742f) * square + (0.333209336f * value - 0.499998599f);
      rest += choose(easy, square * terms + e.low, FloatVec{});
      low_sum += low_doubles(high);
      high_sum += high_doubles(high);
      count += __builtin_popcount(fits);
      filled += store_picked(fits & ~easy, u, others.u + filled);
      left |= masks.valid & ~fits;
    }
    rest_sum += low_doubles(rest) + high_doubles(rest);
  }
  count -= filled - others.count;
  others.count = filled;
  sum += BinSum{sum_lanes(low_sum + high_sum) + sum_lanes(rest_sum), static_cast<double>(count)};
  return left != 0;
}

// Where the sums that elements in turn add to begin, in bytes.
static inline IntVec entries_of(IntVec bins) {
  constexpr int kBytes = sizeof(BinSum);
  IntVec turn;
  for (int lane = 0; lane < kFloats; ++lane) turn[lane] = lane % kCopies * kBytes;
  return bins * (kCopies * kBytes) + turn;
}

// Apart from the loops that compute both: what was stored in vectors just before is slow to load element by element.
static inline void add_to_entries(const double* losses, const int32_t* entries, int count, BinSum* sums) {
  char* bytes = reinterpret_cast<char*>(sums);
#pragma GCC unroll 8
  for (int i = 0; i < count; ++i) {
    BinSum term{0, 1};
    term[0] = losses[i];
    *reinterpret_cast<BinSum*>(bytes + static_cast<uint32_t>(entries[i])) += term;
  }
}

template <int kTable>
static void add_others(OtherLogits& others, const GhmEdges& edges, BinSum* sums) {
  alignas(64) double losses[2 * kBlock];
  alignas(64) int32_t entries[2 * kBlock];
  store_floats(others.u + others.count, FloatVec{});
  const FloatVec scale = scale_of_lowest(edges);
  for (int i = 0; i < others.count; i += kFloats) {
    const FloatVec logit = load_floats(others.u + i);
    const uint32_t positive = greater_mask(logit, all_floats(0));
    const FloatPair e = exp_pair(-absolute(logit));
    const FloatVec value = e.high + e.low, rest = log_rest(e, value), above = choose(positive, logit, FloatVec{});
    store_vec(losses + i, (parabola_of(low_doubles(e.high)) + low_doubles(rest)) + low_doubles(above));
    store_vec(losses + i + kDoubles, (parabola_of(high_doubles(e.high)) + high_doubles(rest)) + high_doubles(above));
    const FloatVec sigma = sigmoid_from_exp(positive, value, reciprocal_estimate(1 + value));
    store_vec(entries + i, entries_of(bins_of<kTable>(edges, logit, scale * sigma)));
  }
  add_to_entries(losses, entries, others.count, sums);
  others.count = 0;
}

static void add_others(OtherLogits& others, const GhmEdges& edges, BinSum* sums) {
  with_table_vectors(edges.bins, [&](auto table) { add_others<decltype(table)::value>(others, edges, sums); });
}

// gradient has room for whole vectors. Returns whether valid elements are left over.
template <int kTable, class In, class Masks>
static bool write_float(const In* preds, int size, const Masks& masks_at, const GhmEdges& edges, const GhmFactors& factors,
                        In* gradient) {
  const FloatVec scale = scale_of_lowest(edges), farthest = all_floats(kLargestFloatExponent);
  uint32_t left = 0;
  for (int i = 0; i < size; i += kFloats) {
    const VectorMasks masks = masks_at(i);
    const FloatVec z = load_floats(preds + i);
    const uint32_t is_near = at_most_mask(absolute(z), farthest), fits = masks.valid & masks.hard & is_near;
    // Tables in memory need an index within them; what those in registers give for other elements is dropped.
    const FloatVec u = negate_where(masks.one, kTable == 0 ? choose(is_near, z, FloatVec{}) : z);
    const FloatVec e = exp_of(u), estimate = reciprocal_estimate(1 + e), sigma = e * reciprocal(1 + e);
    const FloatVec factor = look_up<kTable>(factors.rounded, bins_of<kTable>(edges, u, e * (estimate * scale)));
    store_floats(gradient + i, choose(fits, negate_where(masks.one, sigma * factor), FloatVec{}));
    left |= masks.valid & ~fits;
  }
  return left != 0;
}

// The valid elements of a block that the float path leaves over, as bits.
template <class In>
static void find_left_over(const In* preds, const GhmBlock& block, uint64_t* left_over) {
  for (int i = 0; i < block.size; i += kFloats) {
    const VectorMasks masks = WordMasks{block}(i);
    const uint32_t fits = masks.hard & at_most_mask(absolute(load_floats(preds + i)), all_floats(kLargestFloatExponent));
    left_over[i / 64] |= static_cast<uint64_t>(masks.valid & ~fits) << i % 64;
  }
}
