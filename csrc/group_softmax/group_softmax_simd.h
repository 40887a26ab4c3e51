// Chunks of rows -> losses and tables of their pairs, gradients, scores. Compiled once per instruction set
// (common/for_each_isa.h). Forward goes twice over the logits of a pair, which lie in the nearest cache: the largest but the
// target's, then the exponentials relative to it as pairs of floats, right to 1e-8, and their sum to as much; what follows from
// the sums (logarithms, quotients) for all rows of a chunk at once, in double. Pairs of float64 logits, and those whose numbers
// leave the range of float, are computed in double throughout. Backward: once, in floats right to 7e-7.
#include "common/vectors_simd.h"
#include "group_softmax/row_vectors_simd.h"
#include "group_softmax/shifted_exponentials_simd.h"

// The largest logit but that of column `skipped` (-1: none), NaN left out; `has_constant`: and of 0.
template <class In>
static inline double largest_of(const In* z, int count, int skipped, bool has_constant) {
  double largest = -kDoubleInfinity;
  if constexpr (sizeof(In) == 8) {
    DoubleVec best = all_doubles(-kDoubleInfinity);
    for_doubles(z, count, [&](int i, DoubleVec x, int) {
      if (skipped >= i && skipped < i + kDoubles) x[skipped - i] = -kDoubleInfinity;
      best = x > best ? x : best;
    });
    largest = largest_lane(best);
  } else {
    largest = static_cast<double>(OtherLogits<In>(z, count, skipped).largest_of(count));
  }
  return has_constant && largest < 0 ? 0 : largest;
}

// The sum of e^(z - largest) in double, for any logits; other arguments as above.
template <class In>
static inline double wide_sum(const In* z, int count, int skipped, bool has_constant, double largest) {
  // Where all are -inf, so is the largest, and the difference would be NaN.
  const double shift = largest == -kDoubleInfinity ? 0 : largest;
  DoubleVec sum{};
  for_doubles(z, count, [&](int i, DoubleVec x, int) {
    if (skipped >= i && skipped < i + kDoubles) x[skipped - i] = -kDoubleInfinity;
    sum += exp_minus(shift - x);
  });
  return sum_lanes(sum) + (has_constant ? __builtin_exp(-shift) : 0);
}

// Where exponentials in floats serve: larger logits are not split exactly, and below -86 they are cut off, which must be so far
// from the largest that the probability is below 1e-30.
static inline bool has_float_range(double largest) { return largest >= -16 && largest <= kLargestFloatExponent; }

// What is lower than this far below a logit counts as this low.
static inline FloatVec farthest_from(float largest) {
  return all_floats(largest > 0 ? largest - kLargestFloatExponent : -kLargestFloatExponent);
}

// Sums of exponentials up to kSumOrigin, from which `high` starts: what is cut off in adding to the larger number is exact, and
// added apart, with `low`.
constexpr float kSumOrigin = 128;
constexpr int kMostSummands = 64;
constexpr int kFewLogits = 64;
struct ExponentialSums {
  FloatVec high, rest, low, largest;

  inline void add(FloatVec x, float magic, FloatVec farthest) {
    // NaN stays, and is in `low`.
    const SplitExponent split = split_exponent(larger_of(farthest, x), magic);
    const FloatVec grown = high + split.power;
    rest += split.power - (grown - high);
    low += split.power * excess_of(split);
    largest = larger_of(x, largest);
    high = grown;
  }

  inline DoubleVec sum() const {
    const FloatVec others = rest + low;
    return (low_doubles(high) - kSumOrigin) + (high_doubles(high) - kSumOrigin) + (low_doubles(others) + high_doubles(others));
  }
};

// The sum of e^(z - shift), right to 1e-8 if the largest is near the middle of `shift`; NaN left out of the largest.
template <class In>
static inline double float_sum(const OtherLogits<In>& logits, ExponentShift shift, float middle, float& largest) {
  const FloatVec farthest = farthest_from(middle);
  FloatVec so_far = all_floats(-kFloatInfinity);
  DoubleVec sum{};
  for (int begin = 0; begin < logits.count; begin += kMostSummands * kFloats) {
    ExponentialSums sums = {all_floats(kSumOrigin), FloatVec{}, FloatVec{}, so_far};
    logits.for_each(begin, kMostSummands, [&](FloatVec x) { sums.add(x, shift.magic, farthest); });
    sum += sums.sum();
    so_far = sums.largest;
  }
  largest = largest_lane(so_far);
  return sum_lanes(sum);
}

// The logit in a column, or the constant of others without one.
template <class In>
static inline double logit_at(const In* row, int column) {
  return column < 0 ? 0 : static_cast<double>(widen(row[column]));
}

// Columns of a group, and the constant logit of others without one.
static inline int entries_of(const GroupLayout& layout, int group) {
  return layout.starts[group + 1] - layout.starts[group] + (layout.others[group] < 0 ? 1 : 0);
}

// Whether a sum of e^(z - middle) is right to 1e-8.
static inline bool is_near(double largest, double middle) { return largest >= middle - 3 && largest <= middle + 4.8; }

template <class In>
static inline PairSums sum_pair(const GroupLayout& layout, int group, const In* row, int column) {
  const int start = layout.starts[group], count = layout.starts[group + 1] - start;
  const int at = layout.target_in(group, column), skipped = at < 0 ? -1 : at - start;
  const double target = logit_at(row, at);
  if (entries_of(layout, group) == 2) {
    const double other = count == 1 ? (at < 0 ? static_cast<double>(widen(row[start])) : 0)
                                    : static_cast<double>(widen(row[start + 1 - skipped]));
    const bool is_sound = other < kDoubleInfinity && target < kDoubleInfinity && target > -kDoubleInfinity;
    return {target, other, is_sound ? 1 : __builtin_nan(""), 0};
  }
  // The constant is among the others, unless it is the target.
  const bool has_constant = layout.others[group] < 0 && at >= 0;
  PairSums sums = {target, 0, __builtin_nan(""), 0};
  if (!(target < kDoubleInfinity && target > -kDoubleInfinity)) return sums;
  if constexpr (sizeof(In) < 8) {
    const OtherLogits<In> others(row + start, count, skipped);
    // The largest of a few is mostly near that of all, which saves a pass. Not from other rows: each is computed by itself.
    float middle = has_constant ? kFloatInfinity : others.largest_of(kFewLogits);
    while (has_float_range(middle)) {
      const ExponentShift shift = shift_near(middle);
      float largest;
      const double sum = float_sum(others, shift, middle, largest);
      if (has_float_range(largest) && is_near(largest, middle)) {
        const double other = static_cast<double>(largest);
        return {target, other, sum, shift.remainder + (static_cast<double>(middle) - other)};
      }
      middle = largest;
    }
  }
  sums.other = largest_of(row + start, count, skipped, has_constant);
  if (sums.other < kDoubleInfinity) sums.sum = wide_sum(row + start, count, skipped, has_constant, sums.other);
  return sums;
}

// What the loss and the gradient of a pair need, from e^(z - largest) summed over all logits but the target.
struct PairVectors {
  DoubleVec largest;  // of all
  DoubleVec cross_entropy;
  DoubleVec scale;
  DoubleVec complement;
};

static inline PairVectors finish_pair(DoubleVec target, DoubleVec other, DoubleVec sum) {
  const DoubleVec zero{}, above = other - target, below = exp_minus(absolute(above));
  const LongVec is_above = above > 0.0;
  const DoubleVec rest = is_above ? (sum - 1) + below : sum * below, scale = 1 / (1 + rest);
  return {is_above ? other : target, (is_above ? above : zero) + log_one_plus_any(rest), scale,
          (is_above ? sum : rest) * scale};
}

// The losses of a group's pairs added up, and their tables.
static void finish_pairs(const double* weights, const PairColumns& pairs, double* const* tables, double& loss) {
  DoubleVec total{};
  const DoubleVec zero{}, nan = all_doubles(__builtin_nan(""));
  for (int i = 0; i < kChunkRows; i += kDoubles) {
    const DoubleVec sum = load_vec<DoubleVec>(pairs.sum + i) * exp_minus(-load_vec<DoubleVec>(pairs.remainder + i));
    const PairVectors terms = finish_pair(load_vec<DoubleVec>(pairs.target + i), load_vec<DoubleVec>(pairs.other + i), sum);
    const DoubleVec weight = load_vec<DoubleVec>(weights + i);
    const LongVec is_read = weight != 0.0, is_sound = sum == sum;
    total += is_read ? weight * (is_sound ? terms.cross_entropy : nan) : zero;
    store_vec(tables[kLargest] + i, is_read ? (is_sound ? terms.largest : nan) : zero);
    store_vec(tables[kScale] + i, is_read ? (is_sound ? terms.scale : nan) : zero);
    store_vec(tables[kComplement] + i, is_read ? (is_sound ? terms.complement : nan) : zero);
  }
  loss = sum_lanes(total);
}

// logits: of the first row of the chunk.
template <class In>
static void forward_chunk(const GroupChunk& chunk, const In* logits, GroupChunkResult& result) {
  const GroupLayout& layout = *chunk.layout;
  const int64_t stride = layout.columns();
  for (int group = 0; group < layout.groups; ++group) {
    const int first = group * kChunkRows;
    PairColumns pairs;
    for (int i = 0; i < chunk.rows; ++i) {
      if (chunk.weights[first + i] == 0) continue;
      const PairSums sums = sum_pair(layout, group, logits + i * stride, chunk.columns[i]);
      pairs.target[i] = sums.target;
      pairs.other[i] = sums.other;
      pairs.sum[i] = sums.sum;
      pairs.remainder[i] = sums.remainder;
    }
    double* const tables[kRowTables] = {result.tables[kLargest] + first, result.tables[kScale] + first,
                                        result.tables[kComplement] + first};
    finish_pairs(chunk.weights + first, pairs, tables, result.loss[group]);
  }
}

// e^(z - largest) * scale, within has_float_range; right to 3e-7.
template <class In, class Out>
static inline void write_softmax(const In* z, int count, float largest, double scale, Out* out) {
  const ExponentShift shift = shift_near(largest);
  const FloatVec farthest = farthest_from(largest);
  const float factor = static_cast<float>(scale * exp_of_remainder(all_doubles(shift.remainder))[0]);
  for_floats(z, count, [&](int i, FloatVec x, int some) {
    const SplitExponent split = split_exponent(larger_of(farthest, x), shift.magic);
    const FloatVec value = multiply_add_where(at_most_mask(farthest, x), split.power, excess_of(split), split.power) * factor;
    if (some == kFloats) store_floats(out + i, value);
    else store_some(out + i, value, some);
  });
}

// The same for gradients, within has_float_scale too: right to 7e-7, 0 of what is too small for a normal float.
template <class In>
static inline void write_slopes(const In* z, int count, float largest, double scale, In* out) {
  const ExponentShift shift = shift_near(largest);
  const ScaledExponentials exponentials(shift.magic, scale * exp_of_remainder(all_doubles(shift.remainder))[0]);
  const float least = largest - exponentials.farthest;
  const FloatVec lowest = all_floats(least > -kLargestFloatExponent ? least : -kLargestFloatExponent);
  int i = 0;
  for (; i + kFloats <= count; i += kFloats) store_floats(out + i, exponentials(load_floats(z + i), lowest));
  if (i < count) store_some(out + i, exponentials(load_some(z + i, count - i), lowest), count - i);
}

// The gradient of a pair in double. `factor`: weight over average times upstream gradient.
template <class In>
static void write_wide(const GroupLayout& layout, int group, const In* row, int column, double factor, In* gradient) {
  const int start = layout.starts[group], count = layout.starts[group + 1] - start;
  const int at = layout.target_in(group, column), skipped = at < 0 ? -1 : at - start;
  const bool has_constant = layout.others[group] < 0 && at >= 0;
  const double other = largest_of(row + start, count, skipped, has_constant);
  const double sum = wide_sum(row + start, count, skipped, has_constant, other);
  const PairVectors terms = finish_pair(all_doubles(logit_at(row, at)), all_doubles(other), all_doubles(sum));
  const double largest = terms.largest[0], scale = factor * terms.scale[0];
  for_doubles(row + start, count, [&](int i, DoubleVec x, int some) {
    const DoubleVec slope = exp_minus(largest - x) * scale;
    for (int lane = 0; lane < some; ++lane) gradient[start + i + lane] = In(static_cast<Arithmetic<In>>(slope[lane]));
  });
  if (at >= 0) gradient[at] = In(static_cast<Arithmetic<In>>(-factor * terms.complement[0]));
}

// tables: of the pair.
template <class In>
static inline void write_pair(const GroupLayout& layout, int group, const In* row, int column, double factor,
                              const Arithmetic<In>* tables, int64_t table_size, In* gradient) {
  using Wide = Arithmetic<In>;
  const int start = layout.starts[group], count = layout.starts[group + 1] - start;
  const double complement = static_cast<double>(tables[kComplement * table_size]);
  const int at = layout.target_in(group, column), entries = entries_of(layout, group);
  const Wide largest = tables[kLargest * table_size];
  if (largest != largest) {
    for (int i = 0; i < count; ++i) gradient[start + i] = In(largest);
    return;
  }
  if (entries == 1) {
    gradient[start] = In(Wide(0));
    return;
  }
  const Wide of_target = static_cast<Wide>(-factor * complement);
  const bool has_complement = sizeof(In) == 8 || complement >= kSmallestFloatRest;
  if (entries == 2 && has_complement) {
    gradient[start] = In(at == start ? of_target : -of_target);
    if (count == 2) gradient[start + 1] = In(at == start + 1 ? of_target : -of_target);
    return;
  }
  const double scale = factor * static_cast<double>(tables[kScale * table_size]);
  if constexpr (sizeof(In) == 8) {
    for_doubles(row + start, count, [&](int i, DoubleVec x, int some) {
      const DoubleVec slope = exp_minus(largest - x) * scale;
      for (int lane = 0; lane < some; ++lane) gradient[start + i + lane] = slope[lane];
    });
  } else {
    if (!(has_complement && has_float_range(largest) && has_float_scale(scale)))
      return write_wide(layout, group, row, column, factor, gradient);
    write_slopes(row + start, count, largest, scale, gradient + start);
  }
  if (at >= 0) gradient[at] = In(of_target);
}

// factors: of each group, upstream gradient over average. tables: of the first row of the chunk in group 0; of `rows` rows.
template <class In>
static void backward_chunk(const GroupChunk& chunk, const double* factors, const In* logits, const Arithmetic<In>* tables,
                           int64_t rows, In* gradient) {
  const GroupLayout& layout = *chunk.layout;
  const int64_t stride = layout.columns();
  for (int i = 0; i < chunk.rows; ++i) {
    In* out = gradient + i * stride;
    for (int group = 0; group < layout.groups; ++group) {
      const double weight = chunk.weights[group * kChunkRows + i];
      const int start = layout.starts[group], count = layout.starts[group + 1] - start;
      if (weight == 0) __builtin_memset(out + start, 0, static_cast<size_t>(count) * sizeof(In));
      else
        write_pair(layout, group, logits + i * stride, chunk.columns[i], weight * factors[group], tables + group * rows + i,
                   layout.groups * rows, out);
    }
  }
}

// The softmax of a group into `out`; returns that of others without a column, else 0.
template <class In>
static inline double softmax_of(const GroupLayout& layout, int group, const In* row, Arithmetic<In>* out) {
  const int start = layout.starts[group], count = layout.starts[group + 1] - start;
  const bool has_constant = layout.others[group] < 0;
  const double largest = largest_of(row + start, count, -1, has_constant);
  const bool is_whole = largest < kDoubleInfinity && largest > -kDoubleInfinity;
  double sum = __builtin_nan("");
  if constexpr (sizeof(In) < 8) {
    if (has_float_range(largest) && !has_constant) {
      const float top = static_cast<float>(largest);
      const ExponentShift shift = shift_near(top);
      float largest_again;
      sum = float_sum(OtherLogits<In>(row + start, count, -1), shift, top, largest_again) *
            exp_of_remainder(all_doubles(shift.remainder))[0];
      write_softmax(row + start, count, top, 1 / sum, out + start);
      return 0;
    }
  }
  if (is_whole) sum = wide_sum(row + start, count, -1, has_constant, largest);
  const double scale = 1 / sum;
  for_doubles(row + start, count, [&](int i, DoubleVec x, int some) {
    const DoubleVec value = exp_minus(largest - x) * scale;
    for (int lane = 0; lane < some; ++lane) out[start + i + lane] = static_cast<Arithmetic<In>>(value[lane]);
  });
  return has_constant ? __builtin_exp(-largest) * scale : 0;
}

// Scores of `rows` rows; `probabilities` has room for a row of logits.
template <class In>
static void score_rows(const GroupLayout& layout, const int* class_columns, const In* logits, int64_t rows,
                       Arithmetic<In>* probabilities, In* scores) {
  using Wide = Arithmetic<In>;
  const int64_t stride = layout.columns(), classes = layout.classes;
  for (int64_t row = 0; row < rows; ++row) {
    Wide foreground = 0;
    for (int group = 0; group < layout.groups; ++group) {
      const double constant = softmax_of(layout, group, logits + row * stride, probabilities);
      if (group != layout.background_group) continue;
      const int others = layout.others[group];
      foreground = others < 0 ? static_cast<Wide>(constant) : probabilities[others];
    }
    In* out = scores + row * (classes + 1);
    In* of_classes = out + (layout.background_first ? 1 : 0);
    const auto probability = [&](int64_t number) {
      const int column = class_columns[number];
      return column >= 0 && column < stride ? probabilities[column] : Wide(0);
    };
    for (int64_t number = 0; number < classes; ++number) of_classes[number] = In(probability(number) * foreground);
    out[layout.background_first ? 0 : classes] = In(probability(classes));
  }
}
