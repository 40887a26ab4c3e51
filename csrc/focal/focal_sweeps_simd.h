// Sweeps over the elements of a block that a mask wants: whole vectors, or few that are picked. Part of focal_simd.h.

static inline DoubleVec column_of(const double* column, const FocalBlock& block, int i) {
  return load_vec<DoubleVec>(column + (i & block.wrap));
}
static inline DoublePair column_pair(const double* column, const FocalBlock& block, int i) {
  return {column_of(column, block, i), column_of(column, block, i + kDoubles)};
}
static inline FloatVec column_of(const float* column, const FocalBlock& block, int i) {
  return load_floats(column + (i & block.wrap));
}

// Calls body(first element of the vector, lanes wanted) where any is.
template <class Body>
static inline void for_wanted(const FocalBlock& block, const uint64_t* wanted, const Body& body) {
  for (int begin = 0; begin < block.size; begin += 64) {
    if (wanted[begin / 64] == 0) continue;
    for (int i = begin; i < begin + 64 && i < block.size; i += kFloats) {
      const uint32_t mask = static_cast<uint32_t>(wanted[begin / 64] >> (i - begin)) & kAllFloats;
      if (mask != 0) body(i, mask);
    }
  }
}

// So few that picking them costs less than the vectors that hold any.
static inline bool are_few(const FocalBlock& block, const uint64_t* wanted) {
  int count = 0;
  for (int word = 0; word < block.words(); ++word) count += __builtin_popcountll(wanted[word]);
  return count <= block.size / 8;
}
// Calls body(where they are, their number) for as many elements as fill a vector, and for the rest.
template <class Body>
static inline void for_picked(const FocalBlock& block, const uint64_t* wanted, const Body& body) {
  int at[kFloats], count = 0;
  for (int word = 0; word < block.words(); ++word) {
    for (uint64_t bits = wanted[word]; bits != 0; bits &= bits - 1) {
      at[count++] = word * 64 + __builtin_ctzll(bits);
      if (count < kFloats) continue;
      body(at, kFloats);
      count = 0;
    }
  }
  if (count != 0) body(at, count);
}

// A vector of logits as hard_near takes them, 0 where they are not near. kNegated: x = -z.
struct NearLogits {
  DoublePair near;
  uint32_t above;
  uint32_t is_near;
};

template <bool kNegated, class In>
static inline NearLogits load_near(const In* logits) {
  const FloatVec z = load_floats(logits), distance = absolute(z), none = FloatVec{};
  const uint32_t is_near = at_most_mask(distance, all_floats(static_cast<float>(kFarthest)));
  const FloatVec near = choose(is_near, distance, none);
  return {{low_doubles(near), high_doubles(near)}, kNegated ? greater_mask(none, z) : greater_mask(z, none), is_near};
}

template <bool kNegated>
static inline NearLogits load_near(const double* logits) {
  const DoublePair z = load_doubles(logits);
  const DoubleVec low = absolute(z.low), high = absolute(z.high), farthest = all_doubles(kFarthest), none = DoubleVec{};
  const uint32_t low_near = at_most_mask(low, farthest), high_near = at_most_mask(high, farthest);
  const uint32_t low_above = kNegated ? greater_mask(none, z.low) : greater_mask(z.low, none);
  const uint32_t high_above = kNegated ? greater_mask(none, z.high) : greater_mask(z.high, none);
  return {{choose(low_near, low, none), choose(high_near, high, none)},
          low_above | high_above << kDoubles,
          low_near | high_near << kDoubles};
}

// Calls take(lanes, low, high) with the halves of a vector of elements, their losses and slopes multiplied by w. kPositive: the
// targets are 1, else 0.
template <int kGamma, bool kExact, bool kPositive, class In, class Take>
static inline void take_hard(const In* logits, uint32_t lanes, DoublePair w, DoublePair gamma, const Take& take) {
  const NearLogits x = load_near<kPositive>(logits);
  const auto with_sign = [](const ElementDoubles& x) { return ElementDoubles{x.loss, kPositive ? -x.slope : x.slope}; };
  take(lanes & x.is_near, with_sign(hard_near<kGamma, kExact>(x.near.low, x.above & kAllDoubles, gamma.low, w.low)),
       with_sign(hard_near<kGamma, kExact>(x.near.high, x.above >> kDoubles, gamma.high, w.high)));
  const uint32_t far = lanes & ~x.is_near;
  if (__builtin_expect(far != 0, 0)) {
    const DoublePair z = load_doubles(logits);
    take(far, with_sign(hard_far(kPositive ? -z.low : z.low, w.low)),
         with_sign(hard_far(kPositive ? -z.high : z.high, w.high)));
  }
}

// Calls take(i, lanes, low, high) with the halves of the vectors of elements, multiplied by all weights.
template <int kGamma, bool kExact, bool kPositive, class In, class Take>
static inline void sweep_hard(const In* logits, const FocalBlock& block, const uint64_t* wanted, const Take& take) {
  for_wanted(block, wanted, [&](int first, uint32_t lanes) {
    DoublePair w = column_pair(kPositive ? block.columns.positive : block.columns.negative, block, first), gamma = {};
    if (block.weight != nullptr) {
      const DoublePair v = load_doubles(block.weight + first);
      w = {w.low * v.low, w.high * v.high};
    }
    if constexpr (kGamma < 0) gamma = column_pair(block.columns.gamma, block, first);
    take_hard<kGamma, kExact, kPositive>(
        logits + first, lanes, w, gamma,
        [&](uint32_t taken, const ElementDoubles& low, const ElementDoubles& high) { take(first, taken, low, high); });
  });
}

template <class In, class Take>
static inline void sweep_soft(const FocalTable& table, const In* logits, const FocalBlock& block, const uint64_t* wanted,
                              const Take& take) {
  const ClassColumns& columns = block.columns;
  for_wanted(block, wanted, [&](int first, uint32_t lanes) {
    const DoublePair z = load_doubles(logits + first);
    const auto half = [&](int i, DoubleVec logit) {
      const ElementDoubles element =
          soft_doubles(table.modulator, logit, load_vec<DoubleVec>(block.target + i), column_of(columns.gamma, block, i),
                       column_of(columns.positive, block, i), column_of(columns.negative, block, i));
      if (block.weight == nullptr) return element;
      const DoubleVec v = load_vec<DoubleVec>(block.weight + i);
      return ElementDoubles{v * element.loss, v * element.slope};
    };
    take(first, lanes, half(first, z.low), half(first + kDoubles, z.high));
  });
}

static inline bool modulates_positives(const FocalTable& table) {
  return table.modulator == kFocal || table.modulator == kQuality;
}

// Of the targets of 1 of varifocal loss, which are not modulated.
template <int kGamma, bool kExact, class In, class Take>
static inline void sweep_ones(const FocalTable& table, const In* logits, const FocalBlock& block, const uint64_t* wanted,
                              const Take& take) {
  if (modulates_positives(table)) sweep_hard<kGamma, kExact, true>(logits, block, wanted, take);
  else sweep_hard<0, kExact, true>(logits, block, wanted, take);
}
