// What the CPU passes of the element-wise sigmoid losses work on: levels, the class table laid out as blocks meet it, and a
// block of elements with targets and weights in masks.
#pragma once

#include <cstdint>

#include "common/floating_cpu.h"
#include "common/flush_subnormals.h"
#include "focal/focal.h"

namespace rsloss {

constexpr int kBlock = 1024;
constexpr int kBlockWords = kBlock / 64;
constexpr float kFarthestBackground = 28;  // of targets of 0, below 0, whose losses are computed in float
constexpr int kLanes = 16;                 // of the longest vector
constexpr int kPresenceWords = 32;

// Without qualities, weights or gradients those are null. A level of one class is a map: labels and logits are side by side.
struct FocalLevel {
  const void* logits;
  const void* targets;
  const void* qualities;
  const void* weights;
  const void* grads;  // of every element
  ScalarType target_type;
  ScalarType quality_type;
  ScalarType weight_type;
  ScalarType grad_type;
  FocalLayout layout;
  bool has_labels;
  bool row_weights;
};

// A map in strips: kBlock of its rows at most, and some of the classes.
struct MapStrips {
  int64_t row_parts;
  int64_t class_step;
  int64_t class_parts;
};

inline MapStrips map_strips(const FocalLayout& layout) {
  const int64_t rows = layout.inner < kBlock ? layout.inner : kBlock, step = rows > 0 ? 16 * kBlock / rows : 1;
  return {(layout.inner + kBlock - 1) / kBlock, step, (layout.classes + step - 1) / step};
}

// Numbers of a 16-bit dtype below 0 in the order of their bits, and the losses of targets of 0 there.
struct NarrowLosses {
  uint16_t first;  // bits
  uint16_t count;
  const double* losses;  // without the weight, and a 0 behind the last; null: not used
};

// How a pass multiplies and modulates, by class. The weights are those of the table times the factor of the pass.
struct ClassColumns {
  double* gamma;
  double* positive;
  double* negative;
  float* gamma_high;  // gamma = gamma_high + gamma_low
  float* gamma_low;
  float* positive_rounded;
  float* negative_rounded;
  float* negative_lost;  // in rounding
};

// The class table, and the columns in the order in which the elements of a block meet them: rows again and again, or, where
// rows are longer than a block, once.
struct FocalTable {
  const double* table;  // [3, C]
  LabelRule rule;
  FocalModulator modulator;
  int common_gamma;                // 0, 1 or 2 where every class has it, else -1
  bool has_one_negative_weight;    // all classes have it
  bool has_float_negative_weight;  // floats, their products and what those lose are in the normal range
  NarrowLosses narrow;
  double factor;
  int64_t rows_per_block;  // 0: rows are longer than a block
  int64_t entries;         // of a column
  int64_t columns_size;    // with zeros behind the last
  ClassColumns columns;
  const uint64_t* live_negative;  // bits: the weight is not 0
  const uint64_t* live_positive;
  const uint64_t* live;  // not both are 0
};

// `size` elements. Bits beyond it are 0.
struct FocalBlock {
  int size;
  int words() const { return (size + 63) / 64; }
  int wrap;  // element i has entry i & wrap of the columns and sums
  bool has_labels;
  bool has_one_weight;  // of all targets of 0, but for weights of their own
  bool has_ones;
  bool has_soft;
  // As many words as `size` fills.
  uint64_t negative[kBlockWords];
  uint64_t one[kBlockWords];
  uint64_t soft[kBlockWords];  // targets to be read from `target`
  ClassColumns columns;
  double* positive_sums;
  double* negative_sums;
  float* negative_pulls;  // of rows: slopes that are not in negative_sums yet
  const double* weight;   // null: 1
  alignas(64) double target[kBlock];
  alignas(64) double weights[kBlock];
  // Of maps, whose blocks have one class: its columns, sums, and what the labels of the rows say for all classes.
  alignas(64) double own[5][kLanes];
  alignas(64) float own_rounded[4][kLanes];
  alignas(64) int32_t row_columns[kBlock];
  uint64_t row_ignored[kBlockWords];
  uint64_t present[kPresenceWords];  // bit c modulo its size: a row may have the label of class c
  alignas(64) double row_weights[kBlock];
};

}  // namespace rsloss
