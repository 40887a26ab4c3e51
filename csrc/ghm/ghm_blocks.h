// What the CPU passes of GHM work on: one level of the inputs, and a block of its elements with targets and weights in masks.
#pragma once

#include <cstdint>

#include "common/floating_cpu.h"
#include "common/index_shape.h"
#include "ghm/ghm.h"

namespace rsloss {

struct GhmLevel {
  const void* preds;
  const void* targets;
  const void* weights;  // none: everything is valid
  ScalarType target_type;
  ScalarType weight_type;
  int64_t count;
  IndexShape shape;     // read with labels and weights of rows only
  int64_t first_label;  // the label of column 0
  bool row_weights;     // one weight per row
};

constexpr int kBlock = 512;
constexpr int kBlockWords = kBlock / 64;

// Elements [begin, begin + size) of a level. Bits beyond size are 0. `target` is set where any bit of `soft` is.
struct GhmBlock {
  int64_t begin;
  int size;
  uint64_t valid[kBlockWords];
  uint64_t one[kBlockWords];   // target 1
  uint64_t soft[kBlockWords];  // target neither 0 nor 1, NaN included; for regression every element
  alignas(64) double target[kBlock];
};

// Thresholds of the bins, in front of each what is below every position and behind the last what is above.
struct GhmEdges {
  int bins;
  bool is_regression;
  double mu;
  // [kind, bin]: the threshold between `bin` and the next; hard targets are kind 1, all others kind 0.
  double above[2 * kMostBins];
  // The smallest floats at or above the thresholds, of hard targets or of regression.
  alignas(64) float float_above[kMostBins];
};

// Loss and count of one bin, added in one go.
typedef double BinSum __attribute__((vector_size(16)));

// Of a chunk. Elements take turns among copies of each bin, so that an addition need not wait for the one before; what is not
// valid goes to the entry behind the last bin.
constexpr int kCopies = 8;
struct GhmSums {
  alignas(64) BinSum bins[kCopies * (kMostBins + 1)];
  int64_t nan_count;
};

// w_b times the upstream gradient.
struct GhmFactors {
  double exact[kMostBins];
  alignas(64) float rounded[kMostBins];
};

}  // namespace rsloss
