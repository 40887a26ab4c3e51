// Targets and weights of a block -> bit masks. Part of ghm_simd.h.

// A last block, continued with zeros, for loops over whole vectors.
template <class In>
static const In* pad_block(const In* values, int size, In* padded) {
  for (int i = 0; i < kBlock; ++i) padded[i] = i < size ? values[i] : In(Arithmetic<In>(0));
  return padded;
}

static void set_bits(uint64_t* words, int64_t begin, int64_t end) {
  for (; begin < end; begin = (begin / 64 + 1) * 64) {
    const int64_t word_end = (begin / 64 + 1) * 64, last = end < word_end ? end : word_end;
    words[begin / 64] |= (~uint64_t{0} >> (64 - (last - begin))) << begin % 64;
  }
}

static void clear_words(uint64_t* words) {
  for (int word = 0; word < kBlockWords; ++word) words[word] = 0;
}

// Of a map, whose neighbours are of different rows: bits(row, column, count) are those of the elements of a column in `count`
// rows, at most 64, from `row` on.
template <class Bits>
static inline void fill_planes(const GhmLevel& level, const GhmBlock& block, uint64_t* words, const Bits& bits) {
  const int64_t places = level.shape.places, classes = level.shape.classes;
  int64_t plane = block.begin / places, place = block.begin - plane * places;
  int64_t column = plane % classes, first_row = plane / classes * places;
  for (int64_t at = 0, count; at < block.size; at += count) {
    count = block.size - at < places - place ? block.size - at : places - place;
    if (count > 64) count = 64;
    const uint64_t found = bits(first_row + place, column, static_cast<int>(count));
    words[at / 64] |= found << at % 64;
    if (at % 64 + count > 64) words[at / 64 + 1] |= found >> (64 - at % 64);
    place += count;
    if (place < places) continue;
    place = 0;
    if (++column < classes) continue;
    column = 0;
    first_row += places;
  }
}

template <class Label>
static uint64_t equal_bits(const Label* labels, int64_t wanted, int count) {
  uint64_t bits = 0;
  int i = 0;
#if RSL_ISA == 512
  constexpr int lanes = 64 / sizeof(Label);
  for (; i + lanes <= count; i += lanes) {
    const __m512i label = _mm512_loadu_si512(labels + i);
    if constexpr (sizeof(Label) == 8) bits |= uint64_t{_mm512_cmpeq_epi64_mask(label, _mm512_set1_epi64(wanted))} << i;
    else bits |= uint64_t{_mm512_cmpeq_epi32_mask(label, _mm512_set1_epi32(static_cast<int32_t>(wanted)))} << i;
  }
#elif RSL_ISA == 256
  constexpr int lanes = 32 / sizeof(Label);
  for (; i + lanes <= count; i += lanes) {
    const __m256i label = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(labels + i));
    if constexpr (sizeof(Label) == 8) {
      const __m256i is_equal = _mm256_cmpeq_epi64(label, _mm256_set1_epi64x(wanted));
      bits |= uint64_t{static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(is_equal)))} << i;
    } else {
      const __m256i is_equal = _mm256_cmpeq_epi32(label, _mm256_set1_epi32(static_cast<int32_t>(wanted)));
      bits |= uint64_t{static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(is_equal)))} << i;
    }
  }
#endif
  for (; i < count; ++i) bits |= uint64_t{labels[i] == wanted} << i;
  return bits;
}

// Calls body(row, begin, end) for the rows of the block, with their elements counted from its first one.
template <class Body>
static inline void for_rows(const GhmLevel& level, const GhmBlock& block, const Body& body) {
  int64_t row = block.begin / level.shape.classes, begin = row * level.shape.classes - block.begin;
  for (; begin < block.size; ++row, begin += level.shape.classes) {
    const int64_t end = begin + level.shape.classes;
    body(row, begin < 0 ? 0 : begin, end < block.size ? end : block.size);
  }
}

template <class Label>
static void fill_from_labels(const GhmLevel& level, const Label* labels, GhmBlock& block) {
  clear_words(block.one);
  clear_words(block.soft);
  if (level.shape.places > 1) {
    return fill_planes(level, block, block.one, [&](int64_t row, int64_t column, int count) {
      return equal_bits(labels + row, column + level.first_label, count);
    });
  }
  int64_t row = block.begin / level.shape.classes, begin = row * level.shape.classes - block.begin;
  for (; begin < block.size; ++row, begin += level.shape.classes) {
    const int64_t label = labels[row];
    // In this order nothing overflows, whatever the label.
    if (label < level.first_label || label - level.first_label >= level.shape.classes) continue;
    const int64_t at = begin + (label - level.first_label);
    if (at >= 0 && at < block.size) block.one[at / 64] |= uint64_t{1} << at % 64;
  }
}

template <class In>
static void fill_target_values(const In* targets, GhmBlock& block) {
  for_vectors(targets, block.size, [&](int64_t i, FloatVec target) {
    store_vec(block.target + i, low_doubles(target));
    store_vec(block.target + i + kDoubles, high_doubles(target));
  });
}

static void fill_target_values(const double* targets, GhmBlock& block) {
  for (int i = 0; i < block.size; ++i) block.target[i] = targets[i];
}

template <class In>
static void fill_from_dense(const In* targets, GhmBlock& block) {
  In padded[kBlock];
  const In* data = block.size < kBlock ? pad_block(targets, block.size, padded) : targets;
  uint64_t any_soft = 0;
  for (int word = 0; word < kBlockWords; ++word) {
    uint64_t one = 0, zero = 0;
    for (int shift = 0; shift < 64; shift += kFloats) {
      const FloatVec target = load_floats(data + word * 64 + shift);
      one |= static_cast<uint64_t>(equal_mask(target, all_floats(1))) << shift;
      zero |= static_cast<uint64_t>(equal_mask(target, all_floats(0))) << shift;
    }
    block.one[word] = one;
    block.soft[word] = ~(one | zero);
    any_soft |= block.soft[word];
  }
  if (any_soft != 0) fill_target_values(targets, block);
}

static void fill_from_dense(const double* targets, GhmBlock& block) {
  clear_words(block.one);
  clear_words(block.soft);
  for (int i = 0; i < block.size; ++i) {
    block.target[i] = targets[i];
    block.one[i / 64] |= uint64_t{targets[i] == 1} << i % 64;
    block.soft[i / 64] |= uint64_t{targets[i] != 0 && targets[i] != 1} << i % 64;
  }
}

template <class In>
static void fill_valid_elements(const In* weights, GhmBlock& block) {
  In padded[kBlock];
  const In* data = block.size < kBlock ? pad_block(weights, block.size, padded) : weights;
  for (int word = 0; word < kBlockWords; ++word) {
    uint64_t valid = 0;
    for (int shift = 0; shift < 64; shift += kFloats)
      valid |= static_cast<uint64_t>(greater_mask(load_floats(data + word * 64 + shift), all_floats(0))) << shift;
    block.valid[word] = valid;
  }
}

static void fill_valid_elements(const double* weights, GhmBlock& block) {
  for (int i = 0; i < block.size; ++i) block.valid[i / 64] |= uint64_t{weights[i] > 0} << i % 64;
}

// Of `count` weights, at most 64.
template <class In>
static uint64_t above_zero_bits(const In* weights, int count) {
  uint64_t bits = 0;
  int i = 0;
  if constexpr (sizeof(In) <= 4) {
    for (; i + kFloats <= count; i += kFloats)
      bits |= static_cast<uint64_t>(greater_mask(load_floats(weights + i), all_floats(0))) << i;
  }
  for (; i < count; ++i) bits |= uint64_t{widen(weights[i]) > 0} << i;
  return bits;
}

static void fill_valid(const GhmLevel& level, GhmBlock& block) {
  clear_words(block.valid);
  if (level.weights == nullptr) return set_bits(block.valid, 0, block.size);
  dispatch_floating(level.weight_type, [&](auto tag) {
    const auto* weights = static_cast<const decltype(tag)*>(level.weights);
    if (!level.row_weights) return fill_valid_elements(weights + block.begin, block);
    if (level.shape.places > 1) {
      return fill_planes(level, block, block.valid,
                         [&](int64_t row, int64_t, int count) { return above_zero_bits(weights + row, count); });
    }
    for_rows(level, block, [&](int64_t row, int64_t begin, int64_t end) {
      if (widen(weights[row]) > 0) set_bits(block.valid, begin, end);
    });
  });
}

static void fill_targets(const GhmLevel& level, GhmBlock& block) {
  if (level.target_type == ScalarType::Int) return fill_from_labels(level, static_cast<const int32_t*>(level.targets), block);
  if (level.target_type == ScalarType::Long) return fill_from_labels(level, static_cast<const int64_t*>(level.targets), block);
  dispatch_floating(level.target_type,
                    [&](auto tag) { fill_from_dense(static_cast<const decltype(tag)*>(level.targets) + block.begin, block); });
}

// For the float64 path, which all of the block then may take.
static void fill_regression(const GhmLevel& level, GhmBlock& block) {
  dispatch_floating(level.target_type, [&](auto tag) {
    fill_target_values(static_cast<const decltype(tag)*>(level.targets) + block.begin, block);
  });
  clear_words(block.soft);
  set_bits(block.soft, 0, block.size);
}

static void place_block(int64_t begin, int64_t end, GhmBlock& block) {
  block.begin = begin;
  block.size = static_cast<int>(end - begin < kBlock ? end - begin : kBlock);
}

static void fill_masks(const GhmLevel& level, GhmBlock& block) {
  fill_targets(level, block);
  fill_valid(level, block);
}

// Of a vector of elements: which are valid, have the target 1, have a target of 0 or 1.
struct VectorMasks {
  uint32_t valid;
  uint32_t one;
  uint32_t hard;
};

// From the bits of a block.
struct WordMasks {
  const GhmBlock& block;
  VectorMasks operator()(int i) const {
    const auto at = [i](const uint64_t* words) { return static_cast<uint32_t>(words[i / 64] >> i % 64) & kAllFloats; };
    return {at(block.valid), at(block.one), ~at(block.soft) & kAllFloats};
  }
};

// Straight from dense float32 targets and weights of all elements of a whole block, which is faster than by way of bits.
static bool has_dense_masks(const GhmLevel& level) {
  return level.target_type == ScalarType::Float && level.weights != nullptr && level.weight_type == ScalarType::Float &&
         !level.row_weights;
}
struct DenseMasks {
  const float* targets;
  const float* weights;
  DenseMasks(const GhmLevel& level, int64_t begin)
      : targets(static_cast<const float*>(level.targets) + begin), weights(static_cast<const float*>(level.weights) + begin) {}
  VectorMasks operator()(int i) const {
    const FloatVec target = load_floats(targets + i);
    const uint32_t one = equal_mask(target, all_floats(1)), zero = equal_mask(target, FloatVec{});
    return {greater_mask(load_floats(weights + i), FloatVec{}), one, one | zero};
  }
};
