// A few rows as the passes on the CPU see them.
#pragma once

#include <cstdint>

#include "group_softmax/group_softmax.h"

namespace rsloss {

constexpr int kChunkRows = 32;  // a multiple of every vector of doubles

// Pair (group, row i of the chunk) is entry group * kChunkRows + i.
struct GroupChunk {
  const GroupLayout* layout;
  int rows;
  int columns[kChunkRows];                   // of the rows' labels
  double weights[kMostGroups * kChunkRows];  // 0: not read; rows that are ignored too
};

// What one row's logits are summed up in. sum * e^remainder is r, the exponentials of all but one of the largest logits over
// that one's; or those of all but the target over the target's, whose log1p is the cross entropy. Of a pair of two entries
// `sum` is the distance of the two, and r the exponential of its negative. NaN of a broken pair.
struct PairSums {
  double largest;
  double gap;  // m - z_t
  double sum;
  double remainder;
  bool is_of_target;
};

// Losses of a chunk, the tables of its pairs (row_tables of the README), and sums on the way there.
struct GroupChunkResult {
  double loss[kMostGroups];
  double tables[kRowTables][kMostGroups * kChunkRows];
  double remainder[kMostGroups * kChunkRows];
  double of_target[kMostGroups * kChunkRows];
};

}  // namespace rsloss
