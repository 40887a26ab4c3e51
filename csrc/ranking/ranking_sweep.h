// What the two streaming passes of the CPU backend work on, and what they do with one element. The vector code in
// ranking_simd.h does the same with many. Bins are numbered by distinct breakpoints here: bin d has d of them at or below it.
#pragma once

#include <cstdint>

#include "common/parallel.h"
#include "ranking/cell_grid.h"
#include "ranking/ranking.h"

namespace rsloss {

// Runs body(first cell, one past the last) on several threads.
template <class Body>
void for_cell_ranges(const CellGrid& grid, const Body& body) {
  const int64_t cells = num_cells(grid), tasks = task_count(cells, kCellsPerTask);
  run_tasks(tasks, [&](int64_t task) {
    body(static_cast<int32_t>(task_begin(cells, tasks, task)), static_cast<int32_t>(task_begin(cells, tasks, task + 1)));
  });
}

struct alignas(16) BinSums {
  int64_t count;
  int64_t sum;
};

// Fixed-point offsets from an origin.
struct OffsetScale {
  double scale;  // 1 / unit; 0 for delta = 0
  double most;   // largest offset
};

// ---- binning
// -----------------------------------------------------------------------------------------------------------------

// A cell: its only breakpoint (NaN if there is none) and the number of distinct breakpoints before it. A crowded cell has
// several, or lies at an end of the grid where offsets from the grid's origin would not fit: kCrowded is set, and its elements
// are searched for.
struct BinCell {
  float breakpoint;
  uint32_t before;
};
constexpr uint32_t kCrowded = 0x80000000u;

template <class T>
struct BinPass;

template <>
struct BinPass<float> {
  const float* edges;  // [num_edges] ascending, distinct
  int32_t num_edges;
  CellGrid grid;
  const BinCell* cells;
  double origin;         // of the offsets in `sums`
  OffsetScale far;       // their scale
  double scaled_origin;  // origin * far.scale
  OffsetScale near;      // scale of the offsets in `searched`, from the left breakpoint of the bin
  BinSums* sums;         // [num_edges + 1]
  BinSums* searched;     // [num_edges + 1]
};

template <>
struct BinPass<double> {
  const double* edges;
  int32_t num_edges;
  OffsetScale near;
  BinSums* searched;
};

inline void add(BinSums& bin, double distance, OffsetScale scale) {
  bin.count += 1;
  bin.sum += fixed_point_offset(distance, scale.scale, scale.most);
}

template <class T>
inline void bin_searched(const BinPass<T>& pass, int32_t from, T value) {
  const int32_t bin = count_edges(pass.edges, pass.num_edges, from, value);
  add(pass.searched[bin], static_cast<double>(value) - static_cast<double>(pass.edges[bin - 1]), pass.near);
}

// value >= edges[0]
inline void bin_one(const BinPass<float>& pass, float value) {
  const BinCell cell = pass.cells[cell_of(pass.grid, value)];
  if (cell.before & kCrowded) {
    bin_searched<float>(pass, static_cast<int32_t>(cell.before & ~kCrowded), value);
  } else {
    add(pass.sums[cell.before + (value >= cell.breakpoint ? 1 : 0)], static_cast<double>(value) - pass.origin, pass.far);
  }
}

inline void bin_one(const BinPass<double>& pass, double value) { bin_searched<double>(pass, 0, value); }

// ---- gradient
// ----------------------------------------------------------------------------------------------------------------

// value + slope * (s - left breakpoint) inside a bin.
template <class T>
struct Line {
  T value;
  T slope;
};

// value + slope * t inside a cell, t in cells from its start. Where one line is not good enough, value is NaN and the bits of
// slope hold the number of distinct breakpoints before the cell.
struct CellLine {
  float value;
  float slope;
};

template <class T>
struct GradientPass {
  const T* edges;  // [num_edges] ascending, distinct
  int32_t num_edges;
  const Line<T>* lines;  // [num_edges + 1] by bin, upstream gradient folded in
  T highest;             // largest finite value; +inf is treated as this: the last line is flat
  CellGrid grid;         // float32 only
  const CellLine* cells;
};

template <class T>
inline T searched_gradient(const GradientPass<T>& pass, int32_t from, T value) {
  const int32_t bin = count_edges(pass.edges, pass.num_edges, from, value);
  if (bin == 0) return 0;
  const T bounded = value < pass.highest ? value : pass.highest;
  return pass.lines[bin].value + pass.lines[bin].slope * (bounded - pass.edges[bin - 1]);
}

inline int32_t edges_before(const CellLine& cell) {
  int32_t before;
  __builtin_memcpy(&before, &cell.slope, sizeof before);
  return before;
}

inline float gradient_one(const GradientPass<float>& pass, float value) {
  if (value != value) return value;
  if (!(value >= pass.edges[0])) return 0;
  const int32_t cell = cell_of(pass.grid, value);
  const CellLine line = pass.cells[cell];
  if (line.value != line.value) return searched_gradient(pass, edges_before(line), value);
  const float bounded = value < pass.grid.top ? value : pass.grid.top;
  return line.value + line.slope * (bounded * pass.grid.scale - (pass.grid.origin + static_cast<float>(cell)));
}

inline double gradient_one(const GradientPass<double>& pass, double value) {
  if (value != value) return value;
  return value >= pass.edges[0] ? searched_gradient(pass, 0, value) : 0;
}

}  // namespace rsloss
