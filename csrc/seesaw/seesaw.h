// The mathematics of Seesaw loss, for host and device. Formulas and tensor layouts: rsloss_kernels/losses/seesaw/README.md.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace rsloss {

// Rows of `row_tables`: a, m, 1 / (1 + r), u.
constexpr int kSeesawTables = 4;

struct SeesawTerms {
  double threshold;
  double top;
  double scale;
  double complement;
  double loss;
};

// What is read of a row of `classes` classes.
RSL_HOST_DEVICE bool is_row_used(int64_t label, double weight) { return label >= 0 && weight != 0; }
RSL_HOST_DEVICE bool has_class(int64_t label, double weight, int64_t classes) {
  return is_row_used(label, weight) && label < classes;
}

// at_label: z_y; log_sum: of the exponentials of all class logits; log_eps: -inf for 0.
RSL_HOST_DEVICE double seesaw_threshold(double at_label, double log_sum, double log_eps) {
  return at_label > log_sum + log_eps ? at_label : log_sum + log_eps;
}

// gap: m - z_y; rest: r.
RSL_HOST_DEVICE SeesawTerms seesaw_terms(double threshold, double top, double gap, double rest) {
  const double sum = 1 + rest;
  return {threshold, top, 1 / sum, (gap == 0 ? rest : sum - exp(-gap)) / sum, gap + log1p(rest)};
}

// The loss of foreground against background and its derivative by the logit that is wrong; NaN of a broken row.
struct ObjectnessTerms {
  double loss;
  double slope;
};

RSL_HOST_DEVICE ObjectnessTerms objectness_terms(double right, double wrong) {
  if (!(right > -INFINITY && right < INFINITY && wrong < INFINITY)) return {NAN, NAN};
  const double x = wrong - right, small = exp(-fabs(x));
  return {(x > 0 ? x : 0) + log1p(small), (x > 0 ? 1 : small) / (1 + small)};
}

}  // namespace rsloss
