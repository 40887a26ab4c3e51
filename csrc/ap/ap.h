// The mathematics of the AP loss for one positive, for host and device.
// Derivation: rsloss_kernels/losses/ap/README.md.
#pragma once

#include "common/host_device.h"
#include "ranking/ranking.h"

namespace rsloss {

// e_i = 1 - precision; `sum` is that of H over the positives, the positive itself included.
RSL_HOST_DEVICE double average_precision_error(double sum, double false_positive, double delta) {
  return false_positive / (rank_with_self(sum, delta) + false_positive);
}

// Share of the error per unit of H that a negative takes, before the division by P. The gradient of the positive is minus the
// error.
RSL_HOST_DEVICE double average_precision_coefficient(double error, double false_positive) {
  return false_positive > 0 ? error / false_positive : 0;
}

}  // namespace rsloss
