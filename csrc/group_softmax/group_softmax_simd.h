// Chunks of rows -> losses and tables of their pairs, gradients, scores. Compiled once per instruction set
// (common/for_each_isa.h). Forward goes once over a row, group by group: exponentials relative to the target as pairs of
// floats, right to 1e-8, summed in double; what follows from the sums (logarithms, quotients) for all rows of a chunk at once,
// in double. Pairs of float64 logits, and those whose numbers leave the range of float, are computed in double throughout.
#include "common/vectors_simd.h"
#include "group_softmax/row_vectors_simd.h"
#include "group_softmax/shifted_exponentials_simd.h"

// The largest of the logits, NaN left out; `has_constant`: and of 0.
template <class In>
static inline double largest_of(const In* z, int count, bool has_constant) {
  double largest = -kDoubleInfinity;
  if constexpr (sizeof(In) == 8) {
    DoubleVec best = all_doubles(-kDoubleInfinity);
    for_doubles(z, count, [&](int, DoubleVec x, int) { best = x > best ? x : best; });
    for (int lane = 0; lane < kDoubles; ++lane) largest = best[lane] > largest ? best[lane] : largest;
  } else {
    FloatVec best = all_floats(-kFloatInfinity), other = best;
    int i = 0;
    for (; i + 2 * kFloats <= count; i += 2 * kFloats) {
      const FloatVec x = load_floats(z + i), y = load_floats(z + i + kFloats);
      best = x > best ? x : best;
      other = y > other ? y : other;
    }
    for_floats(z + i, count - i, [&](int, FloatVec x, int) { best = x > best ? x : best; });
    largest = static_cast<double>(largest_lane(best > other ? best : other));
  }
  return has_constant && largest < 0 ? 0 : largest;
}

// r in double, for any pair.
template <class In>
static inline double wide_rest(const In* z, int count, bool has_constant, double largest) {
  DoubleVec sum{}, equal{};
  for_doubles(z, count, [&](int, DoubleVec x, int) {
    const DoubleVec below = largest - x;
    const DoubleVec one = all_doubles(1), none = all_doubles(0);
    sum += below == 0.0 ? none : exp_minus(below);
    equal += below == 0.0 ? one : none;
  });
  double rest = sum_lanes(sum), at_top = sum_lanes(equal);
  if (has_constant) {
    if (largest == 0) at_top += 1;
    else rest += __builtin_exp(-largest);
  }
  return rest + (at_top - 1);
}

// Where exponentials in floats serve: larger logits are not split exactly, and below -86 they are cut off, which must be far
// from the largest.
static inline bool has_float_range(double largest) { return largest >= -20 && largest <= kLargestFloatExponent; }

// How far above a target exponentials relative to it stay within float, and sums of them.
constexpr double kFarthestAbove = 80;

// What is lower than this far below a logit counts as this low.
static inline FloatVec farthest_from(float largest) {
  return all_floats(largest > 0 ? largest - kLargestFloatExponent : -kLargestFloatExponent);
}

// Exponentials of z - t as pairs of floats, which a sum must be of to be right to 1e-8, and the largest logit. One column may
// be left out: `skipped`, within the group or -1.
struct FloatSums {
  DoubleVec high, other;
  FloatVec low, largest;

  template <bool kSkips>
  inline void add(FloatVec x, float magic, FloatVec farthest, uint32_t skipped) {
    // NaN stays, and is in `low`.
    const FloatPair e = exp_pair(at_least(farthest, x), magic);
    const FloatVec e_high = kSkips ? choose(skipped, FloatVec{}, e.high) : e.high;
    high += low_doubles(e_high);
    other += high_doubles(e_high);
    low += kSkips ? choose(skipped, FloatVec{}, e.low) : e.low;
    largest = x > largest ? x : largest;
  }

  inline double sum() const { return sum_lanes((high + other) + (low_doubles(low) + high_doubles(low))); }
};

template <class In>
static inline FloatSums sum_floats(const In* z, int count, int skipped, ExponentShift shift, float target) {
  FloatSums sums = {DoubleVec{}, DoubleVec{}, FloatVec{}, all_floats(-kFloatInfinity)};
  const FloatVec farthest = farthest_from(target);
  // Vectors before that of the column, that one, and those behind.
  const int begin = skipped < 0 ? count : skipped / kFloats * kFloats;
  for (int i = 0; i + kFloats <= begin; i += kFloats) sums.add<false>(load_floats(z + i), shift.magic, farthest, 0);
  if (skipped < 0) {
    if (count % kFloats) sums.add<false>(load_some(z + count - count % kFloats, count % kFloats), shift.magic, farthest, 0);
    return sums;
  }
  const int left = count - begin < kFloats ? count - begin : kFloats;
  sums.add<true>(load_some(z + begin, left), shift.magic, farthest, 1u << (skipped - begin));
  for_floats(z + begin + left, count - begin - left,
             [&](int, FloatVec x, int) { sums.add<false>(x, shift.magic, farthest, 0); });
  return sums;
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

template <class In>
static inline PairSums sum_pair(const GroupLayout& layout, int group, const In* row, int column) {
  const int start = layout.starts[group], count = layout.starts[group + 1] - start;
  const bool has_constant = layout.others[group] < 0;
  const double target = logit_at(row, layout.target_in(group, column));
  if (count + (has_constant ? 1 : 0) == 2) {
    const double first = static_cast<double>(widen(row[start]));
    const double second = has_constant ? 0 : static_cast<double>(widen(row[start + 1]));
    const double largest = first > second ? first : second, distance = largest - (first > second ? second : first);
    const bool is_whole = first == first && second == second && largest < kDoubleInfinity && target > -kDoubleInfinity;
    return {largest, largest - target, is_whole ? distance : __builtin_nan(""), 0, false};
  }
  if constexpr (sizeof(In) < 8) {
    if (!has_constant && target >= -60 && target <= kLargestFloatExponent) {
      const int at = layout.target_in(group, column) - start;
      const ExponentShift shift = shift_near(static_cast<float>(target));
      const FloatSums floats = sum_floats(row + start, count, at, shift, static_cast<float>(target));
      const double largest = static_cast<double>(largest_lane(floats.largest)), rest = floats.sum();
      // Exponentials of what is so far above the target leave the range of float; what was cut off must not count.
      const bool is_in_range = largest <= kLargestFloatExponent && largest - target <= kFarthestAbove;
      const double least = target >= -20 ? kSmallestFloatRest : 1;
      if (is_in_range && !(rest < least)) return {largest, largest - target, rest, shift.remainder, true};
    }
  }
  const double largest = largest_of(row + start, count, has_constant);
  PairSums sums{largest, largest - target, __builtin_nan(""), 0, false};
  if (!(largest < kDoubleInfinity && target > -kDoubleInfinity)) return sums;
  const bool is_alone = count + (has_constant ? 1 : 0) == 1;
  sums.sum = is_alone ? 0 : wide_rest(row + start, count, has_constant, largest);
  return sums;
}

// What follows from the sums of a group's pairs; tables: of the group, at first largest, gap and sum.
static void finish_pairs(const double* weights, bool has_two_entries, const double* remainders, const double* of_target,
                         double* const* tables, double& loss) {
  DoubleVec total{};
  const DoubleVec zero{}, nan = all_doubles(__builtin_nan(""));
  for (int i = 0; i < kChunkRows; i += kDoubles) {
    const DoubleVec top = load_vec<DoubleVec>(tables[kLargest] + i), gap = load_vec<DoubleVec>(tables[kScale] + i);
    const DoubleVec given = load_vec<DoubleVec>(tables[kComplement] + i), weight = load_vec<DoubleVec>(weights + i);
    const DoubleVec rest = has_two_entries ? exp_minus(given) : given * exp_of_remainder(load_vec<DoubleVec>(remainders + i));
    const DoubleVec sum = 1 + rest, below = exp_minus(gap);
    const LongVec is_of_target = load_vec<DoubleVec>(of_target + i) != 0.0;
    const DoubleVec scale = 1 / (is_of_target ? sum * below : sum);
    const DoubleVec complement = ((is_of_target | (gap == 0.0)) ? rest : sum - below) / sum;
    const DoubleVec cross_entropy = (is_of_target ? zero : gap) + log_one_plus_any(rest);
    const LongVec is_read = weight != 0.0, is_sound = given == given;
    total += is_read ? weight * (is_sound ? cross_entropy : nan) : zero;
    store_vec(tables[kLargest] + i, is_read ? (is_sound ? top : nan) : zero);
    store_vec(tables[kScale] + i, is_read ? (is_sound ? scale : nan) : zero);
    store_vec(tables[kComplement] + i, is_read ? (is_sound ? complement : nan) : zero);
  }
  loss = sum_lanes(total);
}

// logits: of the first row of the chunk.
template <class In>
static void forward_chunk(const GroupChunk& chunk, const In* logits, GroupChunkResult& result) {
  const GroupLayout& layout = *chunk.layout;
  const int64_t stride = layout.columns();
  for (int i = 0; i < chunk.rows; ++i) {
    for (int group = 0; group < layout.groups; ++group) {
      const int pair = group * kChunkRows + i;
      if (chunk.weights[pair] == 0) continue;
      const PairSums sums = sum_pair(layout, group, logits + i * stride, chunk.columns[i]);
      result.tables[kLargest][pair] = sums.largest;
      result.tables[kScale][pair] = sums.gap;
      result.tables[kComplement][pair] = sums.sum;
      result.remainder[pair] = sums.remainder;
      result.of_target[pair] = sums.is_of_target ? 1 : 0;
    }
  }
  for (int group = 0; group < layout.groups; ++group) {
    const int first = group * kChunkRows;
    double* const tables[kRowTables] = {result.tables[kLargest] + first, result.tables[kScale] + first,
                                        result.tables[kComplement] + first};
    finish_pairs(chunk.weights + first, entries_of(layout, group) == 2, result.remainder + first, result.of_target + first,
                 tables, result.loss[group]);
  }
}

// e^(z - largest) * scale; floats within has_float_range, or doubles.
template <class In, class Out>
static inline void write_softmax(const In* z, int count, Arithmetic<In> largest, double scale, Out* out) {
  if constexpr (sizeof(In) == 8) {
    for_doubles(z, count, [&](int i, DoubleVec x, int some) {
      const DoubleVec value = exp_minus(largest - x) * scale;
      for (int lane = 0; lane < some; ++lane) out[i + lane] = value[lane];
    });
  } else {
    const ExponentShift shift = shift_near(largest);
    const double grown = exp_of_remainder(all_doubles(shift.remainder))[0];
    const FloatVec farthest = farthest_from(largest), zero{};
    const float factor = static_cast<float>(scale * grown);
    for_floats(z, count, [&](int i, FloatVec x, int some) {
      const uint32_t is_far = greater_mask(farthest, x);
      const FloatVec value = choose(is_far, zero, exp_float(at_least(farthest, x), shift.magic) * factor);
      if (some == kFloats) store_floats(out + i, value);
      else store_some(out + i, value, some);
    });
  }
}

// The gradient of a pair in double. `factor`: weight over average times upstream gradient.
template <class In>
static void write_wide(const GroupLayout& layout, int group, const In* row, int column, double factor, In* gradient) {
  const int start = layout.starts[group], count = layout.starts[group + 1] - start;
  const bool has_constant = layout.others[group] < 0;
  const int at = layout.target_in(group, column);
  const double target = logit_at(row, at), largest = largest_of(row + start, count, has_constant);
  const double rest = wide_rest(row + start, count, has_constant, largest), sum = 1 + rest, gap = largest - target;
  const double complement = (gap == 0 ? rest : sum - __builtin_exp(-gap)) / sum, scale = factor / sum;
  for_doubles(row + start, count, [&](int i, DoubleVec x, int some) {
    const DoubleVec slope = exp_minus(largest - x) * scale;
    for (int lane = 0; lane < some; ++lane) gradient[start + i + lane] = In(static_cast<Arithmetic<In>>(slope[lane]));
  });
  if (at >= 0) gradient[at] = In(static_cast<Arithmetic<In>>(-factor * complement));
}

// tables: of the pair. Floats, or doubles.
template <class In>
static inline void write_pair(const GroupLayout& layout, int group, const In* row, int column, double factor,
                              const Arithmetic<In>* tables, int64_t table_size, In* gradient) {
  using Wide = Arithmetic<In>;
  const int start = layout.starts[group], count = layout.starts[group + 1] - start;
  const double complement = static_cast<double>(tables[kComplement * table_size]);
  const int at = layout.target_in(group, column);
  const bool has_two_entries = entries_of(layout, group) == 2;
  const Wide largest = tables[kLargest * table_size];
  if (largest != largest) {
    for (int i = 0; i < count; ++i) gradient[start + i] = In(largest);
    return;
  }
  const bool has_floats =
      sizeof(In) == 8 || (complement >= kSmallestFloatRest && (has_two_entries || has_float_range(largest)));
  if (!has_floats) {
    if (entries_of(layout, group) == 1) gradient[start] = In(Wide(0));
    else write_wide(layout, group, row, column, factor, gradient);
    return;
  }
  const Wide of_target = static_cast<Wide>(-factor * complement);
  if (has_two_entries) {
    gradient[start] = In(at == start ? of_target : -of_target);
    if (count == 2) gradient[start + 1] = In(at == start + 1 ? of_target : -of_target);
    return;
  }
  write_softmax(row + start, count, largest, factor * static_cast<double>(tables[kScale * table_size]), gradient + start);
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
  const double largest = largest_of(row + start, count, has_constant);
  const bool is_whole = largest < kDoubleInfinity && largest > -kDoubleInfinity;
  if constexpr (sizeof(In) < 8) {
    if (has_float_range(largest) && !has_constant) {
      const float top = static_cast<float>(largest);
      const ExponentShift shift = shift_near(top);
      const double sum =
          sum_floats(row + start, count, -1, shift, top).sum() * exp_of_remainder(all_doubles(shift.remainder))[0];
      write_softmax(row + start, count, top, 1 / sum, out + start);
      return 0;
    }
  }
  const double rest = is_whole ? wide_rest(row + start, count, has_constant, largest) : __builtin_nan("");
  const double scale = 1 / (1 + rest);
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
