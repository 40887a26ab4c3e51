// The mathematics of the aLRP loss for one positive, for host and device.
// Derivation: rsloss_kernels/losses/alrp/README.md.
#pragma once

#include "common/host_device.h"
#include "ranking/ranking.h"

namespace rsloss {

// A false-positive sum at or below this gives no gradient (eps of the authors' code).
constexpr double kLocalisationEps = 1e-5;

struct LocalisationTerms {
  double rank;         // among all elements, the positive itself counts one
  double error;        // of the classification part
  double coefficient;  // share of the gradient per unit of H that a negative takes, before the division by P
  double gradient;     // of the positive itself, before the division by P
};

// `sum` is that of H over the positives, the positive itself included; `regression` that of H r over the others.
RSL_HOST_DEVICE LocalisationTerms localisation_terms(double sum, double regression, double false_positive, double delta) {
  LocalisationTerms terms;
  terms.rank = rank_with_self(sum, delta) + false_positive;
  terms.error = false_positive / terms.rank;
  const bool has_gradient = false_positive > kLocalisationEps;
  const double shared = has_gradient ? (regression + false_positive) / terms.rank : 0;
  terms.coefficient = has_gradient ? shared / false_positive : 0;
  terms.gradient = -shared;
  return terms;
}

}  // namespace rsloss
