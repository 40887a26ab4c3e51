// The mathematics of balanced group softmax, for host and device: labels, groups, sampling, the terms of one row in one group.
// Derivation and tensor layouts: rsloss_kernels/losses/group_softmax/README.md.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace rsloss {

constexpr int kMostGroups = 64;
enum RowTable { kLargest = 0, kScale = 1, kComplement = 2, kRowTables = 3 };

// Below it a pair is computed in float64: what is far below the largest logit of a row counts then.
constexpr double kSmallestFloatRest = 1e-14;

// Which columns belong to a group, and which of them stands for all that does not; others -1: none does, its logit is 0.
struct GroupLayout {
  int groups;
  int classes;  // without the background
  int background_group;
  bool background_first;
  int starts[kMostGroups + 1];
  int others[kMostGroups];

  RSL_HOST_DEVICE int columns() const { return starts[groups]; }

  // Class of a label: `classes` for the background and all above, -1 for rows that are ignored.
  RSL_HOST_DEVICE int class_of(int64_t label) const {
    if (label < 0) return -1;
    const int64_t shifted = background_first ? (label == 0 ? classes : label - 1) : label;
    return static_cast<int>(shifted < classes ? shifted : classes);
  }

  // Column of a row's label (any number) in its group or not.
  RSL_HOST_DEVICE bool holds(int group, int column) const { return column >= starts[group] && column < starts[group + 1]; }

  // Column of the target in a group; -1: the others, where they have no column.
  RSL_HOST_DEVICE int target_in(int group, int column) const { return holds(group, column) ? column : others[group]; }

  // Column -> group; `groups` for a column of none.
  RSL_HOST_DEVICE int group_of(int column) const {
    if (column < 0) return groups;
    int group = 0;
    while (group < groups && column >= starts[group + 1]) ++group;
    return group;
  }
};

// How many of `others` rows are kept.
RSL_HOST_DEVICE int64_t kept_others(int64_t foreground, int64_t others, double ratio) {
  if (foreground == 0) return 0;
  const double wanted = static_cast<double>(foreground) * ratio;
  return wanted >= static_cast<double>(others) ? others : static_cast<int64_t>(wanted);
}

// Orders keys as numbers do, NaN above all of them; `bits` are those of the float.
RSL_HOST_DEVICE uint32_t order_of_key(float key, uint32_t bits) {
  if (key != key) return 0xffffffffu;
  if (key == 0) return 0x80000000u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// What a pair contributes and what its gradient needs.
struct PairTerms {
  double cross_entropy;
  double scale;       // 1 / (1 + r)
  double complement;  // q = 1 - p_t
};

// gap: m - z_t. rest: r, the sum of exponentials less one of the largest, that of the target among them.
RSL_HOST_DEVICE PairTerms pair_terms(double gap, double rest) {
  const double sum = 1 + rest;
  return {gap + log1p(rest), 1 / sum, (gap == 0 ? rest : sum - exp(-gap)) / sum};
}

// Whether the pair is not broken; NaN among the logits makes `rest` NaN.
RSL_HOST_DEVICE bool is_sound(double largest, double target, double rest) {
  return largest < INFINITY && target > -INFINITY && rest == rest;
}

// The divisor of a group's loss; NaN stays.
RSL_HOST_DEVICE double average_factor(double total_weight) { return total_weight <= 1 ? 1 : total_weight; }

}  // namespace rsloss
