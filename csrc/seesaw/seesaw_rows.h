// One row's class logits as the passes on the CPU see them.
#pragma once

#include <cstdint>

#include "seesaw/seesaw.h"

namespace rsloss {

// log_counts: p l_j, with room for whole vectors behind the last.
struct SeesawRow {
  int64_t classes;
  int64_t label;  // a class
  const double* log_counts;
  double q;
  double log_eps;
};

constexpr int kMostLanes = 16;  // a multiple of every vector of floats

}  // namespace rsloss
