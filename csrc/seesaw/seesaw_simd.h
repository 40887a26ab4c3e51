// A row's class logits -> its loss and tables, or their gradient. Compiled once per instruction set (common/for_each_isa.h).
// Forward goes four times over the row, which lies in the nearest cache: the largest logit, the sum of exponentials, the
// largest balanced logit, the sum of exponentials of those. Backward once. All in double: an exponential of a float32 that was
// shifted and rounded would be wrong by more than it may be.
#include "common/vectors_simd.h"

#include "common/exponentials_simd.h"

constexpr double kDoubleInfinity = __builtin_inf();

// The first `count` elements, as many as a vector of floats has at most; lanes behind them are -inf.
template <class In>
static inline DoublePair load_logits(const In* p, int64_t count) {
  if (count >= kFloats) return load_doubles(p);
  double lanes[kFloats];
  for (int i = 0; i < kFloats; ++i) lanes[i] = i < count ? static_cast<double>(widen(p[i])) : -kDoubleInfinity;
  return load_doubles(lanes);
}

static inline void store_slopes(float* p, DoublePair x) { store_floats(p, to_floats(x.low, x.high)); }
static inline void store_slopes(double* p, DoublePair x) { store_doubles(p, x); }
template <class Out>
static inline void store_slopes(Out* p, DoublePair x) {
  store_floats(p, to_floats(x.low, x.high));
}

static inline double largest_lane(DoubleVec x) {
  double largest = x[0];
  for (int lane = 1; lane < kDoubles; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
}

// e^-x for x >= 0 or NaN; 0 where it leaves the normal range.
template <class In>
static inline DoubleVec exp_of_distance(DoubleVec x) {
  const DoubleVec zero{}, most = all_doubles(708);
  return x > most ? zero : exp_minus_by_table<sizeof(In) == 8>(x);
}

// z'.
struct Balance {
  DoubleVec count_of_label;
  DoubleVec threshold;
  DoubleVec q;

  inline DoubleVec operator()(DoubleVec z, DoubleVec log_count) const {
    const DoubleVec zero{}, rarer = log_count - count_of_label, above = z - threshold;
    return z + (rarer > 0.0 ? zero : rarer) + q * (above > 0.0 ? above : zero);
  }
  inline DoublePair operator()(DoublePair z, DoublePair log_counts) const {
    return {(*this)(z.low, log_counts.low), (*this)(z.high, log_counts.high)};
  }
};

static inline Balance balance_of(const SeesawRow& row, double threshold) {
  return {all_doubles(row.log_counts[row.label]), all_doubles(threshold), all_doubles(row.q)};
}

// The largest class logit, NaN left out.
template <class In>
static inline double largest_logit(const SeesawRow& row, const In* logits) {
  DoubleVec low = all_doubles(-kDoubleInfinity), high = low;
  for (int64_t i = 0; i < row.classes; i += kFloats) {
    const DoublePair z = load_logits(logits + i, row.classes - i);
    low = z.low > low ? z.low : low;
    high = z.high > high ? z.high : high;
  }
  return largest_lane(low > high ? low : high);
}

// The logarithm of the sum of the exponentials.
template <class In>
static inline double log_sum_of(const SeesawRow& row, const In* logits, double largest) {
  DoubleVec low{}, high{};
  for (int64_t i = 0; i < row.classes; i += kFloats) {
    const DoublePair z = load_logits(logits + i, row.classes - i);
    low += exp_of_distance<In>(largest - z.low);
    high += exp_of_distance<In>(largest - z.high);
  }
  return largest + __builtin_log(sum_lanes(low + high));
}

// Adds up all but what is equal to the top, which is counted.
struct RestSums {
  DoubleVec sum{};
  DoubleVec equal{};

  template <class In>
  inline void add(DoubleVec below) {
    const DoubleVec zero{}, one = all_doubles(1);
    sum += below == 0.0 ? zero : exp_of_distance<In>(below);
    equal += below == 0.0 ? one : zero;
  }
};

template <class In>
static void seesaw_forward_row(const SeesawRow& row, const In* logits, SeesawTerms& terms) {
  const double largest = largest_logit(row, logits), at_label = static_cast<double>(widen(logits[row.label]));
  const double nan = __builtin_nan("");
  terms = {nan, nan, nan, nan, nan};
  if (!(largest < kDoubleInfinity && at_label > -kDoubleInfinity)) return;
  const bool has_eps = row.log_eps > -kDoubleInfinity;
  const double log_sum = has_eps ? log_sum_of(row, logits, largest) : largest;
  const double threshold = seesaw_threshold(at_label, log_sum, row.log_eps);
  const Balance balance = balance_of(row, threshold);
  DoubleVec low = all_doubles(-kDoubleInfinity), high = low;
  for (int64_t i = 0; i < row.classes; i += kFloats) {
    const DoublePair z = balance(load_logits(logits + i, row.classes - i), load_doubles(row.log_counts + i));
    low = z.low > low ? z.low : low;
    high = z.high > high ? z.high : high;
  }
  const double top = largest_lane(low > high ? low : high);
  RestSums first, second;
  for (int64_t i = 0; i < row.classes; i += kFloats) {
    const DoublePair z = balance(load_logits(logits + i, row.classes - i), load_doubles(row.log_counts + i));
    first.add<In>(top - z.low);
    second.add<In>(top - z.high);
  }
  const double rest = sum_lanes(first.sum + second.sum) + (sum_lanes(first.equal + second.equal) - 1);
  // NaN among the logits is in the sum.
  if (rest == rest) terms = seesaw_terms(threshold, top, top - at_label, rest);
}

// factor: weight times upstream gradient. terms: those of the tables.
template <class In>
static void seesaw_backward_row(const SeesawRow& row, const In* logits, const SeesawTerms& terms, double factor, In* gradient) {
  const Balance balance = balance_of(row, terms.threshold);
  const DoubleVec scale = all_doubles(factor * terms.scale), top = all_doubles(terms.top);
  for (int64_t i = 0; i < row.classes; i += kFloats) {
    const DoublePair z = balance(load_logits(logits + i, row.classes - i), load_doubles(row.log_counts + i));
    const DoublePair slopes = {exp_of_distance<In>(top - z.low) * scale, exp_of_distance<In>(top - z.high) * scale};
    if (i + kFloats <= row.classes) {
      store_slopes(gradient + i, slopes);
    } else {
      In lanes[kFloats];
      store_slopes(lanes, slopes);
      __builtin_memcpy(gradient + i, lanes, static_cast<size_t>(row.classes - i) * sizeof(In));
    }
  }
  gradient[row.label] = In(static_cast<Arithmetic<In>>(-factor * terms.complement));
}
