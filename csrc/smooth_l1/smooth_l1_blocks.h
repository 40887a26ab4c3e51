// What the CPU passes of smooth L1 loss work on.
#pragma once

#include "common/floating_cpu.h"
#include "smooth_l1/smooth_l1.h"

namespace rsloss {

// Elements at a time.
constexpr int kBlock = 512;

// Numbers of a floating type, one for every `row` elements.
struct SmoothL1Column {
  const void* data;  // null: all are 1
  ScalarType type;
  int64_t row;
};

struct SmoothL1Problem {
  SmoothL1Column pred;
  SmoothL1Column target;
  SmoothL1Column weight;
  SmoothL1Column grad;  // of each element, or none
  SmoothL1Beta beta;
  double factor;
};

}  // namespace rsloss
