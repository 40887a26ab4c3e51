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

// What one row's logits are summed up in: sum * e^remainder is the sum of e^(z - other) over all logits but the target, NaN of
// a broken pair.
struct PairSums {
  double target;
  double other;  // the largest but the target
  double sum;
  double remainder;
};

// Those of a group's rows.
struct PairColumns {
  double target[kChunkRows];
  double other[kChunkRows];
  double sum[kChunkRows];
  double remainder[kChunkRows];
};

// Losses of a chunk, and the tables of its pairs (row_tables of the README).
struct GroupChunkResult {
  double loss[kMostGroups];
  double tables[kRowTables][kMostGroups * kChunkRows];
};

}  // namespace rsloss
