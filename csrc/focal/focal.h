// The mathematics of the element-wise sigmoid losses, for host and device: which elements count, their loss and its derivative.
// Derivation and tensor layouts: rsloss_kernels/losses/focal/README.md.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace rsloss {

enum FocalModulator { kFocal = 0, kQuality = 1, kVarifocal = 2, kVarifocalUnweighted = 3, kFocalModulators = 4 };

// Rows of the class table and of the class sums.
enum ClassTableRow { kClassGamma = 0, kPositiveWeight = 1, kNegativeWeight = 2, kClassTableRows = 3 };
enum ClassSumRow { kPositiveSum = 0, kNegativeSum = 1, kClassSumRows = 2 };

// A column of the class table: gamma_c, a_c, b_c.
struct ClassEntry {
  double gamma;
  double positive;
  double negative;
};

// table: [3, C]
RSL_HOST_DEVICE ClassEntry class_entry(const double* table, int64_t classes, int64_t c) {
  return {table[kClassGamma * classes + c], table[kPositiveWeight * classes + c], table[kNegativeWeight * classes + c]};
}

// Elements of such a class are not looked at.
RSL_HOST_DEVICE bool is_dead(const ClassEntry& entry) { return entry.positive == 0 && entry.negative == 0; }

// Whether an element of target t and own weight v counts at all, in a row that does. NaN counts.
RSL_HOST_DEVICE bool element_counts(const ClassEntry& entry, double t, double v) {
  return v != 0 && !(t < 0) && !(t == 0 ? entry.negative == 0 : t == 1 ? entry.positive == 0 : is_dead(entry));
}

// A level in memory, [outer, classes, inner]: rows have inner = 1. Labels, qualities and weights of rows are [outer, inner].
struct FocalLayout {
  int64_t outer;
  int64_t classes;
  int64_t inner;
};

RSL_HOST_DEVICE int64_t class_of(const FocalLayout& layout, int64_t element) { return element / layout.inner % layout.classes; }
RSL_HOST_DEVICE int64_t row_of(const FocalLayout& layout, int64_t element) {
  return element / (layout.inner * layout.classes) * layout.inner + element % layout.inner;
}

// What the labels mean: class c has label first_label + c.
struct LabelRule {
  int64_t classes;
  int64_t first_label;
  int64_t ignore_index;  // any negative number: none but those that are ignored anyway
};

constexpr int64_t kBackgroundRow = -1;
constexpr int64_t kIgnoredRow = -2;

// The column that a label names, or kBackgroundRow, or kIgnoredRow. Nothing overflows, whatever the label.
RSL_HOST_DEVICE int64_t labelled_column(const LabelRule& rule, int64_t label) {
  const bool is_foreground = label >= rule.first_label && label - rule.first_label < rule.classes;
  const bool is_ignored = label < 0 || label == rule.ignore_index;
  return is_ignored ? kIgnoredRow : is_foreground ? label - rule.first_label : kBackgroundRow;
}

// Of one element, not yet multiplied by its own weight. The slope is the derivative by the logit.
struct FocalElement {
  double loss;
  double slope;
};

RSL_HOST_DEVICE double modulating_power(double base, double gamma) {
  return gamma == 0 ? 1 : gamma == 1 ? base : gamma == 2 ? base * base : exp(gamma * log(base));
}

// A target of 0 (x = z) or 1 (x = -z, and the caller negates the slope) with its weight w.
RSL_HOST_DEVICE FocalElement hard_focal_element(double x, double gamma, double w) {
  const double e = exp(-fabs(x)), log_part = log1p(e), larger = 1 / (1 + e), smaller = e * larger;
  const double q = x > 0 ? larger : smaller, rest = x > 0 ? smaller : larger;
  const double softplus = (x > 0 ? x : 0) + log_part, softplus_of_minus = (x > 0 ? 0 : -x) + log_part;
  const double m = gamma == 0 || gamma == 1 || gamma == 2 ? modulating_power(q, gamma) : exp(-gamma * softplus_of_minus);
  // At x = inf nothing is left of the second term, although softplus is infinite.
  const double through_modulator = gamma == 0 || rest == 0 ? 0 : gamma * rest * softplus;
  return {w * m * softplus, w * m * (through_modulator + q)};
}

// Any target, neither 0 nor 1.
RSL_HOST_DEVICE FocalElement soft_focal_element(FocalModulator modulator, double z, double t, const ClassEntry& entry) {
  const double e = exp(-fabs(z)), larger = 1 / (1 + e), smaller = e * larger;
  const double factor = z > 0 ? 1 - t : t, other = z > 0 ? t : 1 - t;
  const double entropy = (factor == 0 ? 0 : factor * fabs(z)) + log1p(e);
  const double error = z > 0 ? factor - smaller : smaller - factor;  // p - t, the derivative of the entropy
  double w = t > 0 ? entry.positive : entry.negative, gamma = entry.gamma, base, base_slope;
  if (modulator == kFocal) {
    w = entry.positive * t + entry.negative * (1 - t);
    base = larger * factor + smaller * other;
    base_slope = larger * smaller * (1 - 2 * t);
  } else {
    base = modulator == kQuality ? fabs(error) : z > 0 ? larger : smaller;
    base_slope = modulator != kQuality || error > 0 ? larger * smaller : -larger * smaller;
    if (modulator != kQuality && t > 0) gamma = 0;
    if (modulator == kVarifocal && t > 0) w *= t;
  }
  // NaN counts where the weight is 0, infinity does not.
  if (w == 0) return error == error ? FocalElement{0, 0} : FocalElement{error, error};
  const double m = modulating_power(base, gamma);
  // The entropy may be infinite where the others are 0.
  const double through_modulator = gamma == 0 || base == 0 || base_slope == 0 ? 0 : gamma * (m / base) * base_slope * entropy;
  return {m == 0 && error == error ? 0 : w * m * entropy, w * (through_modulator + m * error)};
}

// Any element that counts.
RSL_HOST_DEVICE FocalElement focal_element(FocalModulator modulator, double z, double t, const ClassEntry& entry) {
  if (t != 0 && t != 1) return soft_focal_element(modulator, z, t, entry);
  const bool is_positive = t == 1, is_modulated = !is_positive || modulator == kFocal || modulator == kQuality;
  const FocalElement element =
      hard_focal_element(is_positive ? -z : z, is_modulated ? entry.gamma : 0, is_positive ? entry.positive : entry.negative);
  return {element.loss, is_positive ? -element.slope : element.slope};
}

}  // namespace rsloss
