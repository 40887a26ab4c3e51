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

// What one row's logits are summed up in.
struct PairSums {
  double largest;
  double gap;   // m - z_t
  double rest;  // r; NaN of a broken pair
};

// Sums of a chunk, and the tables of its pairs.
struct GroupChunkResult {
  double loss[kMostGroups];
  double tables[kRowTables][kMostGroups * kChunkRows];
};

}  // namespace rsloss
