// What the two streaming passes of the CPU backend work on, whatever the instruction set.
#pragma once

#include <cstdint>

#include "ranking/cell_table.h"
#include "ranking/ranking.h"

namespace rsloss {

// Look-up for float64 logits: plain binary search.
struct EdgeList {
  const double* edges;   // [num_edges] ascending, distinct
  const int32_t* slots;  // [num_edges] last slot among the equal breakpoints of an edge
  int32_t num_edges;
};

struct FoundDouble {
  uint32_t index;  // 2 * slot + 1
  double breakpoint;
};

// value >= edges[0].
inline FoundDouble find(const EdgeList& list, double value) {
  int32_t low = 0, high = list.num_edges;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (list.edges[middle] <= value) low = middle; else high = middle;
  }
  return {2u * static_cast<uint32_t>(list.slots[low]) + 1u, list.edges[low]};
}

// Negatives by the breakpoint they were measured from: [2 * slot + 1] right of it, [2 * slot] left of it (in its look-up cell).
struct alignas(16) BinSums {
  int64_t count;
  int64_t sum;  // of |s - breakpoint| in fixed-point units
};

struct FixedPointScale {
  double scale;  // 1 / unit, 0 for delta = 0
  double most;   // largest offset
};

// The gradient of a negative around one breakpoint: value + slope * (s - breakpoint). Indexed like BinSums.
template <class T>
struct Line {
  T value;
  T slope;
};

}  // namespace rsloss
