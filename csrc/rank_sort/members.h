// What the sums over pairs of positives on the CPU work on; for rank_sort_cpu.cpp and its vector code.
#pragma once

#include <cstdint>

namespace rsloss {

// A positive on its way through the tree of qualities. Ranks are those by logit, positions those by quality.
struct Member {
  int32_t rank;
  int32_t position;
  int32_t lower;   // ranks from here to `upper` have H between 0 and 1
  int32_t upper;   // ranks from here on have H = 1 seen from above, 0 seen from below
  double offset;   // of the logit, from the origin of its cluster
  double value;    // quality, or the weight that better positives push with
  double sum;      // of H over the sources so far
  double product;  // of H times their value
};

}  // namespace rsloss
