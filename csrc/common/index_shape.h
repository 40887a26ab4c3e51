// Where a level of logits with class indices has its rows, for host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace rsloss {

// The level is [outer, classes, places] in memory, what each row has one of (labels, weights) is [outer, places]: [..., C] has
// one place, a map [B, A C, *spatial] has those of its spatial dimensions, and B A in front.
struct IndexShape {
  int64_t classes;
  int64_t places;

  // Of the label of an element.
  RSL_HOST_DEVICE int64_t row(int64_t element) const {
    return places == 1 ? element / classes : element / (classes * places) * places + element % places;
  }
};

}  // namespace rsloss
