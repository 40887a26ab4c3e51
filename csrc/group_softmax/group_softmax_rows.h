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

// What one row's logits are summed up in: r = sum * e^remainder + equal; sum NaN of a broken pair. Of a pair of two entries
// `sum` is the distance of the two, and r the exponential of its negative.
struct PairSums {
  double largest;
  double gap;  // m - z_t
  double sum;
  double remainder;
  double equal;  // logits as large as the largest, less one
};

// Losses of a chunk, the tables of its pairs (row_tables of the README), and sums on the way there.
struct GroupChunkResult {
  double loss[kMostGroups];
  double tables[kRowTables][kMostGroups * kChunkRows];
  double remainder[kMostGroups * kChunkRows];
  double equal[kMostGroups * kChunkRows];
};

}  // namespace rsloss
