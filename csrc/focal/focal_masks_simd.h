// Labels, targets and weights of a block -> bit masks and numbers. Part of focal_simd.h.

// Values for loops over whole vectors: the last vector of a block is continued with zeros.
template <class In>
static inline const In* pad_values(const In* values, int size, In* padded) {
  if (size % kFloats == 0) return values;
  __builtin_memcpy(padded, values, static_cast<size_t>(size) * sizeof(In));
  for (int i = size; i % kFloats != 0; ++i) padded[i] = In(Arithmetic<In>(0));
  return padded;
}

// Logits as they are computed with: for loops over whole vectors.
static inline const double* widen_values(const double* values, int size, double* padded) {
  return pad_values(values, size, padded);
}
template <class In>
static inline const float* widen_values(const In* values, int size, float* widened) {
  if (sizeof(In) == 4 && size % kFloats == 0) return reinterpret_cast<const float*>(values);
  int i = 0;
  for (; i + kFloats <= size; i += kFloats) store_floats(widened + i, load_floats(values + i));
  for (; i < size; ++i) widened[i] = widen(values[i]);
  for (; i % kFloats != 0; ++i) widened[i] = 0;
  return widened;
}

// By the instruction that processors may have, which takes a quarter of the operations; the number of elements narrowed. It
// would make 0 of numbers below the normal range: where there are any, none are.
template <class Value, class Out>
static inline int narrow_by_instruction(const Value*, int, Out*) {
  return 0;
}
#if RSL_ISA == 512 && RSL_KNOWS_EXTENSIONS
[[gnu::target("avx512bf16"), gnu::noinline]] static int narrow_by_instruction(const float* values, int size, BFloat16* output) {
  const __m512i one = _mm512_set1_epi32(1);
  __m512i least = _mm512_set1_epi32(-1);
  int i = 0;
  for (; has_bfloat16_conversion() && i + kFloats <= size; i += kFloats) {
    const __m512 x = _mm512_loadu_ps(values + i);
    const __m512i bits = _mm512_castps_si512(x);
    // Without the sign, and 0 the largest.
    least = _mm512_min_epu32(least, _mm512_sub_epi32(_mm512_add_epi32(bits, bits), one));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(output + i), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  return _mm512_reduce_min_epu32(least) < 0xffffff ? 0 : i;
}
#endif

// And results as they are returned.
template <class Value, class Out>
static inline void narrow_values(const Value* values, int size, Out* output) {
  if constexpr (sizeof(Out) == sizeof(Value)) {
    __builtin_memcpy(output, values, static_cast<size_t>(size) * sizeof(Out));
  } else {
    int i = narrow_by_instruction(values, size, output);
    for (; i + kFloats <= size; i += kFloats) store_floats(output + i, load_floats(values + i));
    if (i == size) return;
    Out last[kFloats];
    store_floats(last, load_floats(values + i));
    __builtin_memcpy(output + i, last, static_cast<size_t>(size - i) * sizeof(Out));
  }
}

static inline void set_bits(uint64_t* words, int begin, int end) {
  for (; begin < end; begin = (begin / 64 + 1) * 64) {
    const int word_end = (begin / 64 + 1) * 64, last = end < word_end ? end : word_end;
    words[begin / 64] |= (~uint64_t{0} >> (64 - (last - begin))) << begin % 64;
  }
}

static inline void set_bit(uint64_t* words, int i) { words[i / 64] |= uint64_t{1} << i % 64; }
static inline bool has_bit(const uint64_t* words, int i) { return words[i / 64] >> i % 64 & 1; }
static inline void set_lanes(uint64_t* words, int i, uint32_t mask) { words[i / 64] |= static_cast<uint64_t>(mask) << i % 64; }

static inline bool any_bit(const FocalBlock& block, const uint64_t* words) {
  uint64_t bits = 0;
  for (int word = 0; word < block.words(); ++word) bits |= words[word];
  return bits != 0;
}

static inline double value_at(ScalarType type, const void* values, int64_t i) {
  double value = 0;
  dispatch_floating(type, [&](auto tag) { value = static_cast<double>(widen(static_cast<const decltype(tag)*>(values)[i])); });
  return value;
}

// Masks while they are being found: what is dropped, and targets that are 1 or any.
struct FoundMasks {
  uint64_t dropped[kBlockWords];
  uint64_t one[kBlockWords];
  uint64_t soft[kBlockWords];
};

// The labelled element of a row: its target is the quality.
static inline void set_labelled(const FocalLevel& level, const FocalTable& table, int64_t row, int64_t column, int at,
                                FoundMasks& found, FocalBlock& block) {
  if (level.qualities == nullptr) return set_bit(found.one, at);
  const double t = value_at(level.quality_type, level.qualities, row);
  if (!element_counts(class_entry(table.table, table.rule.classes, column), t, 1)) return set_bit(found.dropped, at);
  if (t == 1) return set_bit(found.one, at);
  // Also 0: among the sums of its class it is a positive.
  set_bit(found.soft, at);
  block.target[at] = t;
}

// Of rows: element i of the block is that of row first_row + (first_column + i) / C.
template <class Label>
static void find_in_rows(const FocalLevel& level, const FocalTable& table, const Label* labels, int64_t first_row,
                         int64_t first_column, FoundMasks& found, FocalBlock& block) {
  const int64_t classes = table.rule.classes;
  int64_t begin = -first_column;
  for (int64_t row = first_row; begin < block.size; ++row, begin += classes) {
    const int64_t column = labelled_column(table.rule, labels[row]), at = begin + column;
    if (__builtin_expect(column == kIgnoredRow, 0)) {
      const int64_t end = begin + classes;
      set_bits(found.dropped, begin < 0 ? 0 : static_cast<int>(begin), static_cast<int>(end < block.size ? end : block.size));
    } else if (column >= 0 && at >= 0 && at < block.size) {
      set_labelled(level, table, row, column, static_cast<int>(at), found, block);
    }
  }
}

template <class In>
static void find_in_dense(const In* targets, FoundMasks& found, FocalBlock& block) {
  bool has_soft = false;
  In padded[kBlock];
  const In* data = pad_values(targets, block.size, padded);
  for (int i = 0; i < block.size; i += kFloats) {
    uint32_t zero = 0, one = 0, below = 0;
    if constexpr (sizeof(In) <= 4) {
      const FloatVec target = load_floats(data + i);
      if (equal_mask(target, FloatVec{}) == kAllFloats) continue;
      zero = equal_mask(target, FloatVec{}), one = equal_mask(target, all_floats(1)), below = greater_mask(FloatVec{}, target);
    } else {
      for (int lane = 0; lane < kFloats; ++lane) {
        zero |= uint32_t{data[i + lane] == 0} << lane;
        one |= uint32_t{data[i + lane] == 1} << lane;
        below |= uint32_t{data[i + lane] < 0} << lane;
      }
    }
    const uint32_t soft = ~(zero | one | below) & kAllFloats;
    set_lanes(found.one, i, one);
    set_lanes(found.dropped, i, below);
    set_lanes(found.soft, i, soft);
    has_soft |= soft != 0;
  }
  if (has_soft)
    for (int i = 0; i < block.size; i += kFloats) store_doubles(block.target + i, load_doubles(data + i));
}

// v of every element, read or multiplied into what is there; where it is 0 the element is dropped.
template <class In>
static void read_weights(const In* weights, FoundMasks& found, FocalBlock& block) {
  In padded[kBlock];
  const In* data = pad_values(weights, block.size, padded);
  for (int i = 0; i < block.size; i += kFloats) {
    const DoublePair v = load_doubles(data + i);
    store_doubles(block.weights + i, v);
    if constexpr (sizeof(In) <= 4) {
      set_lanes(found.dropped, i, equal_mask(load_floats(data + i), FloatVec{}));
    } else {
      for (int lane = 0; lane < kFloats; ++lane) set_lanes(found.dropped, i + lane, data[i + lane] == 0);
    }
  }
  block.weight = block.weights;
}

template <class In>
static void multiply_grads(const In* grads, FocalBlock& block) {
  In padded[kBlock];
  const In* data = pad_values(grads, block.size, padded);
  for (int i = 0; i < block.size; i += kFloats) {
    DoublePair v = load_doubles(data + i);
    if (block.weight != nullptr) {
      const DoublePair before = load_doubles(block.weight + i);
      v = {before.low * v.low, before.high * v.high};
    }
    store_doubles(block.weights + i, v);
  }
  block.weight = block.weights;
}

static void read_row_weights(const FocalLevel& level, int64_t first_row, int64_t first_column, FoundMasks& found,
                             FocalBlock& block) {
  const int64_t classes = level.layout.classes;
  int64_t begin = -first_column;
  for (int64_t row = first_row; begin < block.size; ++row, begin += classes) {
    const double v = value_at(level.weight_type, level.weights, row);
    const int first = begin < 0 ? 0 : static_cast<int>(begin);
    const int end = static_cast<int>(begin + classes < block.size ? begin + classes : block.size);
    for (int i = first; i < end; ++i) block.weights[i] = v;
    if (v == 0) set_bits(found.dropped, first, end);
  }
  for (int i = block.size; i % kFloats != 0; ++i) block.weights[i] = 0;
  block.weight = block.weights;
}

template <class Body>
static inline void with_labels(const FocalLevel& level, const Body& body) {
  if (level.target_type == ScalarType::Int) body(static_cast<const int32_t*>(level.targets));
  else body(static_cast<const int64_t*>(level.targets));
}

// element: of the level, the first of the block.
static void find_dense_and_weights(const FocalLevel& level, int64_t element, FoundMasks& found, FocalBlock& block) {
  if (!level.has_labels)
    dispatch_floating(level.target_type, [&](auto tag) {
      find_in_dense(static_cast<const decltype(tag)*>(level.targets) + element, found, block);
    });
  if (level.weights != nullptr && !level.row_weights)
    dispatch_floating(level.weight_type, [&](auto tag) {
      read_weights(static_cast<const decltype(tag)*>(level.weights) + element, found, block);
    });
}

// live: bits of the entries from the first that the block has.
static void finish_masks(const FocalLevel& level, int64_t element, const uint64_t* live_negative, const uint64_t* live_positive,
                         const uint64_t* live, const FoundMasks& found, FocalBlock& block) {
  for (int word = 0; word < block.words(); ++word) {
    const uint64_t valid = ~found.dropped[word];
    block.negative[word] = valid & ~found.one[word] & ~found.soft[word] & live_negative[word];
    block.one[word] = valid & found.one[word] & live_positive[word];
    block.soft[word] = valid & found.soft[word] & live[word];
  }
  if (block.size % 64 != 0) {
    const uint64_t inside = ~uint64_t{0} >> (64 - block.size % 64);
    for (uint64_t* words : {block.negative, block.one, block.soft}) words[block.size / 64] &= inside;
  }
  block.has_labels = level.has_labels;
  block.has_ones = any_bit(block, block.one);
  block.has_soft = any_bit(block, block.soft);
  if (level.grads != nullptr)
    dispatch_floating(level.grad_type,
                      [&](auto tag) { multiply_grads(static_cast<const decltype(tag)*>(level.grads) + element, block); });
}

// A block of rows. first_column: a multiple of 64.
static void fill_from_rows(const FocalLevel& level, const FocalTable& table, int64_t first_row, int64_t first_column, int size,
                           FocalBlock& block) {
  const int64_t element = first_row * table.rule.classes + first_column, word = first_column / 64;
  FoundMasks found = {};
  block.size = size;
  block.weight = nullptr;
  if (level.has_labels)
    with_labels(level, [&](auto labels) { find_in_rows(level, table, labels, first_row, first_column, found, block); });
  if (level.weights != nullptr && level.row_weights) read_row_weights(level, first_row, first_column, found, block);
  find_dense_and_weights(level, element, found, block);
  finish_masks(level, element, table.live_negative + word, table.live_positive + word, table.live + word, found, block);
}

// What the labels and weights of `size` rows of a map say for all its classes.
static void read_map_rows(const FocalLevel& level, const FocalTable& table, int64_t first_row, int size, FocalBlock& block) {
  if (level.has_labels) {
    const LabelRule rule = table.rule;
    with_labels(level, [&, rule](auto labels) {
      for (int i = 0; i < size; ++i) block.row_columns[i] = static_cast<int32_t>(labelled_column(rule, labels[first_row + i]));
    });
    for (int i = size; i % kFloats != 0; ++i) block.row_columns[i] = kIgnoredRow;
    for (uint64_t& word : block.present) word = 0;
    for (uint64_t& word : block.row_ignored) word = 0;
    for (int i = 0; i < size; i += kFloats) {
      const IntVec columns = load_vec<IntVec>(block.row_columns + i);
      set_lanes(block.row_ignored, i, mask_of(columns == static_cast<int32_t>(kIgnoredRow)));
      for (uint32_t bits = mask_of(columns >= 0); bits != 0; bits &= bits - 1)
        set_bit(block.present, block.row_columns[i + __builtin_ctz(bits)] % (64 * kPresenceWords));
    }
  }
  if (level.weights != nullptr && level.row_weights) {
    FoundMasks unused = {};
    block.size = size;
    dispatch_floating(level.weight_type, [&](auto tag) {
      read_weights(static_cast<const decltype(tag)*>(level.weights) + first_row, unused, block);
    });
    __builtin_memcpy(block.row_weights, block.weights, sizeof block.weights);
  }
}

// For a class all of whose elements are alike.
struct AllWords {
  uint64_t zeros[kBlockWords] = {};
  uint64_t ones[kBlockWords] = {};
  constexpr AllWords() {
    for (uint64_t& word : ones) word = ~uint64_t{0};
  }
};

// The elements of class `column` of the rows that were read; the class is not dead.
static void fill_from_map(const FocalLevel& level, const FocalTable& table, int64_t first_row, int64_t column, int64_t element,
                          int size, FocalBlock& block) {
  const ClassEntry entry = class_entry(table.table, table.rule.classes, column);
  FoundMasks found = {};
  block.size = size;
  block.weight = nullptr;
  if (level.weights != nullptr && level.row_weights) {
    block.weight = block.row_weights;
    for (int i = 0; i < size; i += kFloats)
      for (int lane = 0; lane < kFloats; ++lane) set_lanes(found.dropped, i + lane, block.row_weights[i + lane] == 0);
  }
  for (int word = 0; level.has_labels && word < block.words(); ++word) found.dropped[word] |= block.row_ignored[word];
  const bool may_be_labelled = level.has_labels && has_bit(block.present, static_cast<int>(column % (64 * kPresenceWords)));
  for (int i = 0; may_be_labelled && i < size; i += kFloats) {
    const IntVec columns = load_vec<IntVec>(block.row_columns + i);
    const uint32_t labelled = mask_of(columns == static_cast<int32_t>(column));
    if (level.qualities == nullptr) {
      set_lanes(found.one, i, labelled);
    } else {
      for (uint32_t bits = labelled; bits != 0; bits &= bits - 1) {
        const int at = i + __builtin_ctz(bits);
        set_labelled(level, table, first_row + at, column, at, found, block);
      }
    }
  }
  find_dense_and_weights(level, element, found, block);
  static constexpr AllWords kAll;
  finish_masks(level, element, entry.negative != 0 ? kAll.ones : kAll.zeros, entry.positive != 0 ? kAll.ones : kAll.zeros,
               kAll.ones, found, block);
}
