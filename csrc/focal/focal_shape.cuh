// How a problem becomes launches, on the host: which arithmetic, how classes and rows are dealt to tiles, blocks and threads,
// and the levels of each launch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "focal/focal_elements.cuh"
#include "focal/focal_stream.cuh"

namespace rsloss {

// Blocks that are to be resident, which bounds the registers. Class sums keep 16 more.
template <class T, bool kSums>
constexpr int kFocalBlocks = sizeof(T) == sizeof(double) || kSums ? 2 : 3;

// How a problem is cut into classes, tiles and blocks; the same for all of its launches.
struct FocalShape {
  bool is_double;
  bool is_across;
  bool is_maps;
  int units;
  int lanes;
  int block;
  int class_tiles;
  int64_t most_blocks;  // of one tile of classes
  int64_t shared;       // bytes
};

// Rows of one class lie in memory as places do.
inline bool is_maps(const FocalProblem& problem) {
  bool has_inner = problem.classes == 1;
  for (int i = 0; i < problem.num_levels; ++i) has_inner = has_inner || problem.levels[i].inner > 1;
  return has_inner;
}

// In float32 where nothing that is streamed is wider.
inline bool is_double(const FocalProblem& problem) {
  bool is_wide = problem.logits_type == Type::kDouble;
  for (int i = 0; i < problem.num_levels; ++i) {
    const FocalDeviceLevel& level = problem.levels[i];
    is_wide = is_wide || level.targets_type == Type::kDouble ||
              (level.weights != nullptr && level.weights_type == Type::kDouble) ||
              (level.qualities != nullptr && level.qualities_type == Type::kDouble) ||
              (level.grads != nullptr && level.grads_type == Type::kDouble);
  }
  return is_wide;
}

inline FocalShape focal_shape(const FocalProblem& problem, bool class_sums, const DeviceLimits& limits) {
  FocalShape shape = {};
  shape.is_double = is_double(problem);
  shape.is_maps = is_maps(problem);
  shape.is_across = !shape.is_double && !shape.is_maps && problem.classes % kQuad == 0;
  const int64_t all_units = shape.is_across ? problem.classes / kQuad : problem.classes;
  // Sums in registers take one class per thread.
  const int64_t most_units = !shape.is_maps ? kThreads : class_sums ? 1 : kMapClasses;
  shape.class_tiles = static_cast<int>(ceil_div(all_units, most_units));
  shape.units = static_cast<int>(ceil_div(all_units, shape.class_tiles));
  shape.block = kThreads;
  shape.lanes = kThreads;
  if (!shape.is_maps) {
    // As few threads as possible without classes.
    for (int block = kThreads; block >= kThreads / 2; block -= kWarp) {
      const int used = block / shape.units * shape.units, best = shape.block / shape.units * shape.units;
      if (used * shape.block > best * block) shape.block = block;
    }
    shape.lanes = shape.block / shape.units;
  }
  const int classes = shape.is_across ? kQuad : 1;
  const int64_t tables = static_cast<int64_t>(sizeof(TwoFloat)) * ExponentialTable::kEntries +
                         2 * classes * shape.units * static_cast<int64_t>(sizeof(HardClass));
  const int64_t cells = class_sums ? kClassSumRows * classes * shape.block * static_cast<int64_t>(sizeof(double)) : 0;
  shape.shared = std::max(tables, cells);
  const int64_t resident = limits.processors * static_cast<int64_t>(shape.is_double || class_sums ? kFocalBlocks<double, true>
                                                                                                  : kFocalBlocks<float, false>);
  shape.most_blocks = std::max<int64_t>(1, resident / shape.class_tiles);
  return shape;
}

// Levels [first, ...) as one launch sees them; *next: the first one of the launch behind it. Those of nothing are left out.
inline FocalStream focal_stream(const FocalProblem& problem, const FocalShape& shape, int first, int* next) {
  FocalStream stream = {};
  stream.is_maps = shape.is_maps;
  stream.class_tiles = shape.class_tiles;
  stream.classes = static_cast<int>(problem.classes);
  stream.units = shape.units;
  stream.lanes = shape.lanes;
  stream.labels = problem.labels;
  stream.class_table = problem.class_table;
  stream.modulator = problem.modulator;
  stream.normalizer = problem.normalizer;
  stream.normalizer_type = problem.normalizer_type;
  stream.grad = problem.grad;
  stream.grad_type = problem.grad_type;
  stream.scale = problem.scale;
  int i = first;
  for (; i < problem.num_levels && stream.num_levels < kMostFocalLevels; ++i) {
    const FocalDeviceLevel& level = problem.levels[i];
    if (level.outer * level.inner == 0) continue;
    FocalStreamLevel& at = stream.levels[stream.num_levels++];
    at.logits = column_of(level.logits, problem.logits_type);
    at.targets = column_of(level.targets, level.targets_type);
    at.qualities = column_of(level.qualities, level.qualities_type);
    at.weights = column_of(level.weights, level.weights_type);
    at.grads = column_of(level.grads, level.grads_type);
    at.outputs = column_of(level.outputs, problem.logits_type);
    at.weights_by_row = level.weights_by_row;
    // With one class everything is one row of places.
    const int64_t outer = problem.classes == 1 ? 1 : level.outer;
    at.inner = problem.classes == 1 ? level.outer * level.inner : level.inner;
    if (at.inner % kQuad != 0 && outer * problem.classes > 1) {
      // Quads of places do not start at multiples of four.
      for (Column* column : {&at.logits, &at.targets, &at.weights, &at.grads, &at.outputs}) {
        column->is_aligned = column->is_aligned && shape.is_across;
      }
    }
    at.rows = shape.is_maps ? outer * ceil_div(at.inner, kQuad) : outer;
    at.first_tile = stream.tiles;
    const int64_t rows_of_tile =
        shape.is_maps ? shape.lanes : static_cast<int64_t>(shape.lanes) * kRowSteps * (shape.is_across ? 1 : kQuad);
    stream.tiles += ceil_div(at.rows, rows_of_tile);
  }
  while (i < problem.num_levels && problem.levels[i].outer * problem.levels[i].inner == 0) ++i;
  *next = i;
  return stream;
}

// Calls body(stream, blocks per tile of classes) for every launch.
template <class Body>
cudaError_t for_launches(const FocalProblem& problem, const FocalShape& shape, Body body) {
  for (int first = 0; first < problem.num_levels;) {
    int next;
    const FocalStream stream = focal_stream(problem, shape, first, &next);
    first = next;
    if (stream.tiles > 0) RSL_RETURN_IF_ERROR(body(stream, std::min(stream.tiles, shape.most_blocks)));
  }
  return cudaSuccess;
}

struct FocalSlots {
  int64_t blocks = 0;
  int64_t of_tile = 0;
};
inline FocalSlots count_slots(const FocalProblem& problem, const FocalShape& shape) {
  FocalSlots slots;
  for_launches(problem, shape, [&](const FocalStream&, int64_t blocks) {
    slots.blocks += blocks * shape.class_tiles;
    slots.of_tile += blocks;
    return cudaSuccess;
  });
  return slots;
}

// Calls body(T, whether classes lie across).
template <class Body>
cudaError_t dispatch(const FocalShape& shape, Body body) {
  if (shape.is_double) return body(double{}, std::false_type{});
  return shape.is_across ? body(float{}, std::true_type{}) : body(float{}, std::false_type{});
}

}  // namespace rsloss
