// Strips of a level -> the sum of losses with the sums of classes, single losses, or gradients. Compiled once per instruction
// set (common/for_each_isa.h). A block of elements at a time: targets and weights become bit masks (focal_masks_simd.h); then a
// sweep takes the targets of 0, one those of 1 and one all others, each the vectors that hold any; where there are few they are
// picked (focal_sweeps_simd.h). Elements are computed in double (focal_elements_simd.h), but for float32 and narrower logits
// gradients (focal_slopes_simd.h), and losses of targets of 0 at logits of 0 and below (focal_background_simd.h), in float;
// many such losses of 16-bit logits come from a table (focal_narrow_simd.h).
#include "common/vectors_simd.h"

#include "common/exponentials_simd.h"
#include "focal/focal_elements_simd.h"
#include "focal/focal_masks_simd.h"

#include "focal/focal_sweeps_simd.h"

#include "focal/focal_functions_simd.h"

#include "focal/focal_background_simd.h"
#include "focal/focal_slopes_simd.h"

template <int kGamma>
struct CommonGamma {
  static constexpr int value = kGamma;
};
template <class Body>
static inline void with_gamma(const FocalTable& table, const Body& body) {
  if (table.common_gamma == 0) body(CommonGamma<0>{});
  else if (table.common_gamma == 1) body(CommonGamma<1>{});
  else if (table.common_gamma == 2) body(CommonGamma<2>{});
  else body(CommonGamma<-1>{});
}

#include "focal/focal_narrow_simd.h"

// Adds the targets of 0 of the mask, few of the block and without weights of their own.
template <int kGamma, bool kClassSums>
static inline void add_few(const float* logits, const FocalBlock& block, const uint64_t* wanted, DoublePair& total) {
  for_picked(block, wanted, [&](const int* at, int count) {
    alignas(64) float z[kFloats] = {};
    alignas(64) double w[kFloats] = {}, gamma[kFloats] = {}, slopes[kFloats];
    for (int lane = 0; lane < count; ++lane) {
      z[lane] = logits[at[lane]], w[lane] = block.columns.negative[at[lane] & block.wrap];
      if constexpr (kGamma < 0) gamma[lane] = block.columns.gamma[at[lane] & block.wrap];
    }
    const auto add = [&](uint32_t lanes, const ElementDoubles& low, const ElementDoubles& high) {
      add_where(total, lanes, {low.loss, high.loss});
      if constexpr (kClassSums) {
        store_doubles(slopes, {absolute(low.slope), absolute(high.slope)});
        for (; lanes != 0; lanes &= lanes - 1) {
          const int lane = __builtin_ctz(lanes);
          block.negative_sums[at[lane] & block.wrap] += slopes[lane];
        }
      }
    };
    take_hard<kGamma, false, false>(z, (1u << count) - 1, load_doubles(w), load_doubles(gamma), add);
  });
}

static inline void add_to_class_sums(double* sums, const FocalBlock& block, int i, uint32_t lanes,
                                     const ElementDoubles& element) {
  double* at = sums + (i & block.wrap);
  store_vec(at, load_vec<DoubleVec>(at) + choose(lanes, absolute(element.slope), DoubleVec{}));
}

template <int kGamma, ClassSums kSums>
static inline bool sum_background(const float* logits, const FocalBlock& block, FocalStages& stages, uint64_t* left_over,
                                  DoublePair& result) {
  if (block.has_one_weight) return sum_background<kGamma, kSums, true>(logits, block, stages, left_over, result);
  return sum_background<kGamma, kSums, false>(logits, block, stages, left_over, result);
}
template <int kGamma, bool kClassSums>
static inline bool sum_background(const float* logits, const FocalBlock& block, FocalStages& stages, uint64_t* left_over,
                                  DoublePair& result) {
  if (!kClassSums) return sum_background<kGamma, ClassSums::kNone>(logits, block, stages, left_over, result);
  if (block.wrap == -1) return sum_background<kGamma, ClassSums::kOfEntries>(logits, block, stages, left_over, result);
  return sum_background<kGamma, ClassSums::kOfBlock, true>(logits, block, stages, left_over, result);
}

// All but the targets of 0 that are not of the mask `zeros`. In: float or double.
template <int kGamma, bool kClassSums, class In>
[[gnu::flatten]] static void sum_others(const FocalTable& table, const In* logits, const FocalBlock& block,
                                        const uint64_t* zeros, DoublePair& result) {
  constexpr bool kExact = sizeof(In) == 8;
  DoublePair total = result;
  const auto add_to = [&](double* sums) {
    return [&, sums](int i, uint32_t lanes, const ElementDoubles& low, const ElementDoubles& high) {
      const uint32_t low_lanes = lanes & kAllDoubles, high_lanes = lanes >> kDoubles;
      total.low = choose(low_lanes, total.low + low.loss, total.low);
      total.high = choose(high_lanes, total.high + high.loss, total.high);
      if constexpr (kClassSums) {
        add_to_class_sums(sums, block, i, low_lanes, low);
        add_to_class_sums(sums, block, i + kDoubles, high_lanes, high);
      }
    };
  };
  bool is_summed = false;
  if constexpr (!kExact) {
    is_summed = zeros != block.negative && are_few(block, zeros);
    if (is_summed) add_few<kGamma, kClassSums>(logits, block, zeros, total);
  }
  if (!is_summed) sweep_hard<kGamma, kExact, false>(logits, block, zeros, add_to(block.negative_sums));
  if (block.has_ones) sweep_ones<kGamma, kExact>(table, logits, block, block.one, add_to(block.positive_sums));
  result = total;
  if (!block.has_soft) return;
  const auto add_positive = add_to(block.positive_sums), add_negative = add_to(block.negative_sums);
  sweep_soft(table, logits, block, block.soft,
             [&](int i, uint32_t lanes, const ElementDoubles& low, const ElementDoubles& high) {
               uint32_t positive = lanes;
               // A dense target that is NaN is none.
               for (uint32_t bits = block.has_labels ? 0 : lanes; bits != 0; bits &= bits - 1)
                 if (!(block.target[i + __builtin_ctz(bits)] > 0)) positive &= ~(bits & -bits);
               if (positive != 0) add_positive(i, positive, low, high);
               if (positive != lanes) add_negative(i, lanes & ~positive, low, high);
             });
  result = total;
}

// padded: room for a block.
template <int kGamma, bool kClassSums, class In>
static inline void sum_block(const FocalTable& table, const In* logits, const FocalBlock& block, Arithmetic<In>* padded,
                             DoublePair& result) {
  if constexpr (sizeof(In) == 2 && kGamma >= 0 && !kClassSums) {
    uint16_t places[kBlock];
    uint64_t left_over[kBlockWords];
    if (table.narrow.losses != nullptr && block.weight == nullptr &&
        find_places(logits, block, table.narrow, places, left_over)) {
      const double sum = sum_by_places(table.narrow.losses, places, block.words());
      // An infinite weight multiplies nothing where there is nothing.
      if (sum != 0) result.low[0] += block.columns.negative[0] * sum;
      if (widen_others(logits, block, left_over, padded))
        sum_others<kGamma, kClassSums>(table, padded, block, left_over, result);
      return;
    }
  }
  if constexpr (sizeof(In) <= 4) {
    if (block.weight == nullptr && (block.has_one_weight || table.has_float_negative_weight)) {
      FocalStages stages;
      uint64_t left_over[kBlockWords];
      const float* data = find_exponentials(logits, block, padded, stages);
      const bool is_left = sum_background<kGamma, kClassSums>(data, block, stages, left_over, result);
      if (is_left || block.has_ones || block.has_soft) sum_others<kGamma, kClassSums>(table, data, block, left_over, result);
      return;
    }
  }
  sum_others<kGamma, kClassSums>(table, widen_values(logits, block.size, padded), block, block.negative, result);
}

template <class Out>
static inline void store_where(Out* output, int i, uint32_t lanes, DoubleVec low, DoubleVec high) {
  if constexpr (sizeof(Out) == 8) {
    const DoublePair before = load_doubles(output + i);
    store_doubles(output + i, {choose(lanes & kAllDoubles, low, before.low), choose(lanes >> kDoubles, high, before.high)});
  } else {
    store_floats(output + i, choose(lanes, to_floats(low, high), load_floats(output + i)));
  }
}

template <class Out>
static inline void clear_output(Out* output, int size) {
  __builtin_memset(output, 0, static_cast<size_t>((size + kFloats - 1) / kFloats * kFloats) * sizeof(Out));
}

// Through double, the elements of the masks alone.
template <bool kGradient, int kGamma, class In>
[[gnu::flatten]] static void write_wide(const FocalTable& table, const In* logits, const FocalBlock& block,
                                        const uint64_t* zeros, const uint64_t* ones, In* output) {
  constexpr bool kExact = sizeof(In) == 8;
  const auto write = [&](int i, uint32_t lanes, const ElementDoubles& low, const ElementDoubles& high) {
    if constexpr (kGradient) store_where(output, i, lanes, low.slope, high.slope);
    else store_where(output, i, lanes, low.loss, high.loss);
  };
  sweep_hard<kGamma, kExact, false>(logits, block, zeros, write);
  if (any_bit(block, ones)) sweep_ones<kGamma, kExact>(table, logits, block, ones, write);
  if (block.has_soft) sweep_soft(table, logits, block, block.soft, write);
}

// Slopes in float, of targets of 0 or 1, of the lanes that are not beyond the range of floats.
struct FloatSlopes {
  FloatVec slopes;
  uint32_t is_small;
};
template <int kGamma, bool kPositive>
static inline FloatSlopes float_slopes(FloatVec z, FloatVec w, FloatVec gamma_high, FloatVec gamma_low) {
  const FloatVec distance = absolute(z), none = FloatVec{};
  const uint32_t above = kPositive ? greater_mask(none, z) : greater_mask(z, none);
  const FloatVec slope = w * hard_slope<kGamma>(distance, above, gamma_high, gamma_low);
  return {kPositive ? -slope : slope, at_most_mask(distance, all_floats(kLargestFloatExponent))};
}

// Writes the elements of the mask alone. What is beyond the range of floats is left over.
template <int kGamma, bool kPositive>
[[gnu::flatten]] static void write_float(const float* logits, const FocalBlock& block, const uint64_t* wanted,
                                         uint64_t* left_over, float* output) {
  const ClassColumns& columns = block.columns;
  const float* weights = kPositive ? columns.positive_rounded : columns.negative_rounded;
  if (are_few(block, wanted)) {
    for_picked(block, wanted, [&](const int* at, int count) {
      alignas(64) float z[kFloats] = {}, w[kFloats] = {}, gamma_high[kFloats] = {}, gamma_low[kFloats] = {}, slopes[kFloats];
      for (int lane = 0; lane < count; ++lane) {
        const int i = at[lane], entry = i & block.wrap;
        z[lane] = logits[i], w[lane] = weights[entry];
        if (block.weight != nullptr) w[lane] *= static_cast<float>(block.weight[i]);
        if constexpr (kGamma < 0) gamma_high[lane] = columns.gamma_high[entry], gamma_low[lane] = columns.gamma_low[entry];
      }
      const FloatSlopes result =
          float_slopes<kGamma, kPositive>(load_floats(z), load_floats(w), load_floats(gamma_high), load_floats(gamma_low));
      store_floats(slopes, result.slopes);
      for (int lane = 0; lane < count; ++lane) {
        if (result.is_small >> lane & 1) output[at[lane]] = slopes[lane];
        else set_bit(left_over, at[lane]);
      }
    });
    return;
  }
  for_wanted(block, wanted, [&](int i, uint32_t lanes) {
    const FloatVec gamma_high = kGamma < 0 ? column_of(columns.gamma_high, block, i) : FloatVec{};
    const FloatVec gamma_low = kGamma < 0 ? column_of(columns.gamma_low, block, i) : FloatVec{};
    const FloatSlopes result =
        float_slopes<kGamma, kPositive>(load_floats(logits + i), float_weight(weights, block, i), gamma_high, gamma_low);
    store_floats(output + i, choose(lanes & result.is_small, result.slopes, load_floats(output + i)));
    set_lanes(left_over, i, lanes & ~result.is_small);
  });
}

// padded: room for a block.
template <int kGamma, class In>
static void write_gradient(const FocalTable& table, const In* logits, const FocalBlock& block, Arithmetic<In>* padded,
                           Arithmetic<In>* output) {
  if constexpr (sizeof(In) == 8) {
    clear_output(output, block.size);
    const double* data = widen_values(logits, block.size, padded);
    write_wide<true, kGamma>(table, data, block, block.negative, block.one, output);
  } else {
    SlopeStages stages;
    uint64_t above[kBlockWords], zeros[kBlockWords] = {}, ones[kBlockWords] = {};
    const float* data = find_exponentials(logits, block, padded, stages);
    if (write_background<kGamma>(data, block, stages, above, output))
      write_float<kGamma, false>(data, block, above, zeros, output);
    if (block.has_ones) {
      if (modulates_positives(table)) write_float<kGamma, true>(data, block, block.one, ones, output);
      else write_float<0, true>(data, block, block.one, ones, output);
    }
    if (block.has_soft || any_bit(block, zeros) || any_bit(block, ones))
      write_wide<true, -1>(table, data, block, zeros, ones, output);
  }
}

static inline ClassColumns columns_from(const ClassColumns& all, int64_t first) {
  return {all.gamma + first,     all.positive + first,         all.negative + first,         all.gamma_high + first,
          all.gamma_low + first, all.positive_rounded + first, all.negative_rounded + first, all.negative_lost + first};
}

static void set_class(const FocalTable& table, int64_t c, FocalBlock& block) {
  const ClassEntry entry = class_entry(table.table, table.rule.classes, c);
  const double positive = entry.positive * table.factor, negative = entry.negative * table.factor;
  const float high = static_cast<float>(entry.gamma), low = static_cast<float>(entry.gamma - static_cast<double>(high));
  for (int lane = 0; lane < kLanes; ++lane) {
    block.own[0][lane] = entry.gamma, block.own[1][lane] = positive, block.own[2][lane] = negative;
    block.own_rounded[0][lane] = high, block.own_rounded[1][lane] = low;
    block.own_rounded[2][lane] = static_cast<float>(positive), block.own_rounded[3][lane] = static_cast<float>(negative);
  }
  block.columns = {block.own[0],         block.own[1],         block.own[2],         block.own_rounded[0],
                   block.own_rounded[1], block.own_rounded[2], block.own_rounded[3], nullptr};
}

// Of a level in strips: some rows, as many as the table says, or a part of a map.
static inline bool is_map(const FocalLevel& level) { return level.layout.inner > 1 || level.layout.classes == 1; }

// Calls body(first element) for the blocks of the strips [begin, end). sums: null, or [2, size of the columns], to which they
// add.
template <class Body>
static inline void for_row_blocks(const FocalLevel& level, const FocalTable& table, int64_t begin, int64_t end, double* sums,
                                  float* pulls, FocalBlock& block, const Body& body) {
  const int64_t classes = level.layout.classes, rows = level.layout.outer;
  block.wrap = -1;
  block.has_one_weight = table.has_one_negative_weight;
  const auto run = [&](int64_t row, int64_t column, int64_t size) {
    block.columns = columns_from(table.columns, column);
    if (sums != nullptr)
      block.positive_sums = sums + column, block.negative_sums = sums + table.columns_size + column,
      block.negative_pulls = pulls + column;
    fill_from_rows(level, table, row, column, static_cast<int>(size), block);
    body(row * classes + column);
  };
  for (int64_t strip = begin; strip < end; ++strip) {
    if (table.rows_per_block > 0) {
      const int64_t row = strip * table.rows_per_block, rest = rows - row;
      run(row, 0, (rest < table.rows_per_block ? rest : table.rows_per_block) * classes);
      continue;
    }
    for (int64_t column = 0; column < classes; column += kBlock)
      run(strip, column, classes - column < kBlock ? classes - column : kBlock);
  }
}

// Of a class of a map, the sum in the lanes.
static inline double sum_own(const double* lanes) {
  DoubleVec sum = load_vec<DoubleVec>(lanes);
  for (int i = kDoubles; i < kLanes; i += kDoubles) sum += load_vec<DoubleVec>(lanes + i);
  return sum_lanes(sum);
}

// The same for a map; skip(first element, size) for what is of a dead class. sums: null or [2, C].
template <class Body, class Skip>
static inline void for_map_blocks(const FocalLevel& level, const FocalTable& table, int64_t begin, int64_t end, double* sums,
                                  FocalBlock& block, const Body& body, const Skip& skip) {
  const int64_t classes = level.layout.classes, inner = level.layout.inner;
  const MapStrips strips = map_strips(level.layout);
  block.wrap = kLanes - 1;
  block.has_one_weight = true;
  block.positive_sums = block.own[3], block.negative_sums = block.own[4];
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t part = strip / strips.class_parts, first_class = strip % strips.class_parts * strips.class_step;
    const int64_t last_class = first_class + strips.class_step < classes ? first_class + strips.class_step : classes;
    const int64_t outer = part / strips.row_parts, first = part % strips.row_parts * kBlock, row = outer * inner + first;
    const int size = static_cast<int>(inner - first < kBlock ? inner - first : kBlock);
    read_map_rows(level, table, row, size, block);
    for (int64_t c = first_class; c < last_class; ++c) {
      const int64_t element = (outer * classes + c) * inner + first;
      if (is_dead(class_entry(table.table, classes, c))) {
        skip(element, size);
        continue;
      }
      set_class(table, c, block);
      for (int lane = 0; lane < kLanes; ++lane) block.own[3][lane] = block.own[4][lane] = 0;
      fill_from_map(level, table, row, c, element, size, block);
      body(element);
      if (sums == nullptr) continue;
      sums[classes + c] += sum_own(block.negative_sums);
      if (block.has_ones || block.has_soft) sums[c] += sum_own(block.positive_sums);
    }
  }
}

// Moves what strips of rows added to `pulls` into the sums of the entries.
template <int kGamma>
static void add_pulls(const FocalTable& table, float* pulls, double* negative_sums) {
  constexpr double unscale = kBackgroundUnscale<kGamma>;
  for (int64_t i = 0; i < table.entries; i += kFloats) {
    const DoublePair pull = load_doubles(pulls + i), w = load_doubles(table.columns.negative + i),
                     sum = load_doubles(negative_sums + i);
    // Where there is nothing the weight may be anything.
    const auto add = [](DoubleVec sum, DoubleVec w, DoubleVec pull) {
      return pull == 0.0 ? sum : sum + absolute(w) * (unscale * pull);
    };
    store_doubles(negative_sums + i, {add(sum.low, w.low, pull.low), add(sum.high, w.high, pull.high)});
    store_floats(pulls + i, FloatVec{});
  }
}

// Adds to `sums`, which is null or as for_row_blocks and for_map_blocks say; returns the sum of the losses. pulls: as many
// zeros as columns, for the sums of rows.
template <class In>
static double sum_strips(const FocalLevel& level, const FocalTable& table, const In* logits, int64_t begin, int64_t end,
                         double* sums, float* pulls) {
  FocalBlock block;
  Arithmetic<In> padded[kBlock];
  DoublePair total = {};
  with_gamma(table, [&](auto gamma) {
    constexpr int kGamma = decltype(gamma)::value;
    const auto add = [&](int64_t element) {
      if (sums != nullptr) sum_block<kGamma, true>(table, logits + element, block, padded, total);
      else sum_block<kGamma, false>(table, logits + element, block, padded, total);
    };
    if (is_map(level)) for_map_blocks(level, table, begin, end, sums, block, add, [](int64_t, int) {});
    else if (sums == nullptr) for_row_blocks(level, table, begin, end, sums, pulls, block, add);
    // Of each entry a few slopes are added in float.
    for (int64_t first = begin; !is_map(level) && sums != nullptr && first < end; first += 8) {
      for_row_blocks(level, table, first, first + 8 < end ? first + 8 : end, sums, pulls, block, add);
      add_pulls<kGamma>(table, pulls, sums + table.columns_size);
    }
  });
  return sum_lanes(total.low + total.high);
}

// Gradients, or losses, of all elements of the strips.
template <bool kGradient, class In>
static void write_strips(const FocalLevel& level, const FocalTable& table, const In* logits, int64_t begin, int64_t end,
                         In* output) {
  using Value = Arithmetic<In>;
  FocalBlock block;
  Value padded[kBlock], padded_output[kBlock];
  with_gamma(table, [&](auto gamma) {
    const auto write = [&](int64_t element) {
      Value* result = padded_output;
      if constexpr (sizeof(In) >= 4) {
        if (block.size % kFloats == 0) result = output + element;
      }
      if constexpr (kGradient) {
        write_gradient<decltype(gamma)::value>(table, logits + element, block, padded, result);
      } else {
        clear_output(result, block.size);
        const Value* data = widen_values(logits + element, block.size, padded);
        write_wide<false, -1>(table, data, block, block.negative, block.one, result);
      }
      if (result == padded_output) narrow_values(result, block.size, output + element);
    };
    const auto skip = [&](int64_t element, int size) {
      __builtin_memset(output + element, 0, static_cast<size_t>(size) * sizeof(In));
    };
    if (is_map(level)) for_map_blocks(level, table, begin, end, nullptr, block, write, skip);
    else for_row_blocks(level, table, begin, end, nullptr, nullptr, block, write);
  });
}
