// A uniform grid over the breakpoints: from a float32 logit to its bin, or to the line of its gradient, with one look-up.
// Exact, because logits and breakpoints are put into cells by the same monotone arithmetic. The width of a cell is a power of
// two and the grid starts at a multiple of it, so scaling is exact and the distance of a logit from the start of its cell comes
// out of one fma.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace rsloss {

constexpr int64_t kMostCells = int64_t{1} << 18;
constexpr int64_t kCellsPerTask = 1 << 12;

struct CellGrid {
  float scale;      // cells per logit unit, a power of two
  float origin;     // start of cell 0 in cells, an integer
  float last_cell;  // number of cells - 1; cell 0 and the last one also take everything outside
  float top;        // end of the last cell
  double width;     // of a cell, 1 / scale
  bool cuts_low;    // breakpoints lie below the grid, all in cell 0
  bool cuts_high;   // breakpoints lie above the grid, all in the last cell
};

inline int32_t num_cells(const CellGrid& grid) { return static_cast<int32_t>(grid.last_cell) + 1; }

// In vector code: fmsub, max with 0, min with last_cell, truncate. The product is exact, so a fused multiply changes nothing.
// NaN: cell 0.
inline float position_of(const CellGrid& grid, float value) {
  const float position = value * grid.scale - grid.origin;
  return position > 0 ? (position < grid.last_cell ? position : grid.last_cell) : 0.0f;
}

inline int32_t cell_of(const CellGrid& grid, float value) { return static_cast<int32_t>(position_of(grid, value)); }

inline double start_of_cell(const CellGrid& grid, int32_t cell) {
  return (static_cast<double>(grid.origin) + cell) * grid.width;
}

// The distinct ones of the ascending `edges`. Without any the passes still look for NaN: one edge at the largest finite value
// keeps them free of a case of their own. It meets +inf only, whose sums nobody reads and whose line is 0.
template <class T>
std::vector<T> distinct_edges(const double* edges, int64_t count) {
  if (count == 0) return {std::numeric_limits<T>::max()};
  std::vector<T> distinct;
  distinct.reserve(count);
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || edges[i] != edges[i - 1]) distinct.push_back(static_cast<T>(edges[i]));
  return distinct;
}

// How many of the ascending edges are <= value, knowing that the first `from` are: doubling steps, then halving.
template <class T>
inline int32_t count_edges(const T* edges, int32_t num_edges, int32_t from, T value) {
  int32_t low = from, reach = 1;
  while (low + reach <= num_edges && edges[low + reach - 1] <= value) {
    low += reach;
    reach *= 2;
  }
  int32_t high = std::min(low + reach - 1, num_edges);
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (edges[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Many cells per edge leave few cells with several edges; fewer when there are not enough elements to pay for writing them.
inline CellGrid make_grid(const std::vector<float>& edges, int64_t cells_per_edge, int64_t elements) {
  const int64_t last = static_cast<int64_t>(edges.size()) - 1;
  const int64_t wanted =
      std::max<int64_t>(64, std::min<int64_t>(cells_per_edge * (last + 1), std::max<int64_t>(elements / 8, 2 * (last + 1))));
  const int64_t cells = std::min(wanted, kMostCells - 4);
  // The whole range of the edges, unless a few outliers stretch it far beyond the bulk: then they share the outermost cells.
  const double bulk_low = edges[last / 16], bulk_high = edges[last - last / 16], reach = 4 * (bulk_high - bulk_low);
  const double from = std::max<double>(edges[0], bulk_low - reach), to = std::min<double>(edges[last], bulk_high + reach);
  const double width = std::max(to - from, 1e-25);
  CellGrid grid;
  grid.scale = static_cast<float>(std::exp2(std::floor(std::log2(static_cast<double>(cells) / width))));
  grid.origin = std::floor(static_cast<float>(from) * grid.scale);
  grid.last_cell = std::floor(std::fmin(static_cast<float>(to) * grid.scale - grid.origin, static_cast<float>(cells))) + 1;
  grid.top = (grid.origin + grid.last_cell + 1) / grid.scale;
  grid.width = 1 / static_cast<double>(grid.scale);
  grid.cuts_low = from > edges[0];
  grid.cuts_high = to < edges[last];
  return grid;
}

// Calls clean(first cell, one past the last, edges before) and occupied(cell, first edge, one past the last) in ascending
// order, for the cells from `from` to one before `to`.
template <class Clean, class Occupied>
void for_cells(const CellGrid& grid, const std::vector<float>& edges, int32_t from, int32_t to, const Clean& clean,
               const Occupied& occupied) {
  const int32_t count = static_cast<int32_t>(edges.size());
  int32_t cell = from;
  int32_t edge = static_cast<int32_t>(
      std::partition_point(edges.begin(), edges.end(), [&](float value) { return cell_of(grid, value) < from; }) -
      edges.begin());
  while (edge < count) {
    const int32_t at = cell_of(grid, edges[edge]), begin = edge;
    if (at >= to) break;
    if (cell < at) clean(cell, at, edge);
    while (edge < count && cell_of(grid, edges[edge]) == at) ++edge;
    occupied(at, begin, edge);
    cell = at + 1;
  }
  if (cell < to) clean(cell, to, edge);
}

}  // namespace rsloss
