// What the sums over pairs of positives on the CPU work on; for rank_sort_cpu.cpp and its vector code.
#pragma once

#include <cstdint>

namespace rsloss {

// A positive on its way through the tree of qualities. The members of a node are ascending by logit and numbered from 0; the
// position is that by quality among all positives.
struct Member {
  int32_t position;
  int32_t lower;   // members of the node from here to `upper` have H between 0 and 1
  int32_t upper;   // from here on they have H = 1 seen from above, 0 seen from below
  double offset;   // of the logit, from the origin of its cluster
  double value;    // quality, or the weight that better positives push with
  double sum;      // of H over the sources so far
  double product;  // of H times their value
};

// What a node of `count` members needs while it is split.
struct NodeRoom {
  Member* scratch;        // [count]
  double* prefix;         // [4 count]
  int32_t* worse_before;  // [count + 1], of 2 count: how many of the first members go to the worse half
};

}  // namespace rsloss
