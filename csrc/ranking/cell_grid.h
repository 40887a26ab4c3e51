// A uniform grid over the breakpoints, the same for every segment: from a float32 logit to its bin, or to the line of its
// gradient, with one look-up. Exact, because logits and breakpoints are put into cells by the same monotone arithmetic. The
// width of a cell is a power of two and the grid starts at a multiple of it, so scaling is exact and the distance of a logit
// from the start of its cell comes out of one fma.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <vector>

#include "ranking/windows_cpu.h"

namespace rsloss {

constexpr int64_t kMostCells = int64_t{1} << 22;
constexpr int64_t kCellsPerTask = 1 << 12;

struct CellGrid {
  float scale;      // cells per logit unit, a power of two
  float origin;     // start of cell 0 in cells, an integer
  float last_cell;  // number of cells - 1; cell 0 and the last one also take everything outside
  float top;        // end of the last cell, finite
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

// The edges [first, end) are those of one segment, ascending and distinct.
struct EdgePart {
  int32_t first;
  int32_t end;
};

// The distinct breakpoints of all segments that have any, one after the other. Where elements may belong to none of these, and
// where there are none at all, the passes still look for NaN: a last part with one edge at the largest finite value keeps them
// free of a case of their own. It meets +inf only, whose sums nobody reads and whose line is 0.
template <class T>
struct PartedEdges {
  // breakpoints: ranks [a, b) have [2a, 2b) of them.
  PartedEdges(const double* breakpoints, const std::vector<SegmentRange>& ranges, int64_t num_segments, bool has_ids) {
    edges.reserve(2 * count_ranks(ranges) + 1);
    for (const SegmentRange& range : ranges) {
      parts.push_back({size(), size()});
      for (int64_t slot = 2 * range.begin; slot < 2 * range.end; ++slot)
        if (slot == 2 * range.begin || breakpoints[slot] != breakpoints[slot - 1])
          edges.push_back(static_cast<T>(breakpoints[slot]));
      parts.back().end = size();
    }
    has_nobody = has_ids || num_segments > static_cast<int64_t>(parts.size());
    if (has_nobody) {
      edges.push_back(std::numeric_limits<T>::max());
      parts.push_back({size() - 1, size()});
    }
    if (!has_ids && num_segments == 1) return;
    part_of.assign(num_segments + 1, static_cast<int32_t>(parts.size()) - 1);
    for (size_t part = 0; part < ranges.size(); ++part) part_of[ranges[part].segment] = static_cast<int32_t>(part);
  }

  int32_t size() const { return static_cast<int32_t>(edges.size()); }
  int32_t part(int64_t segment) const { return part_of.empty() ? 0 : part_of[segment]; }
  // Parts of segments, or that of none where it is the only one. The grid depends on these alone: one segment has the same
  // cells however it is given.
  int64_t num_ranked() const { return std::max<int64_t>(1, static_cast<int64_t>(parts.size()) - has_nobody); }
  T lowest(int32_t part) const { return edges[parts[part].first]; }

  std::vector<T> edges;
  std::vector<EdgePart> parts;
  std::vector<int32_t> part_of;  // [num_segments + 1]; empty where all elements belong to the only part
  bool has_nobody;               // the last part is that of no segment
};

// How many of all edges lie before or at a value of the part whose edges end at `end`, knowing that `from` do. Mostly at most
// one more does: no branch depends on that one. Else doubling steps, then halving.
template <class T>
inline int32_t count_edges(const T* edges, int32_t end, int32_t from, T value) {
  int32_t low = from == end ? end : from + static_cast<int32_t>(edges[from] <= value), reach = 1;
  if (low == end || !(edges[low] <= value)) return low;
  while (low + reach <= end && edges[low + reach - 1] <= value) {
    low += reach;
    reach *= 2;
  }
  int32_t high = std::min(low + reach - 1, end);
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (edges[middle] <= value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Where the finite ones of the first `count` edges lie: the least, the one above a sixteenth of them, the one below a
// sixteenth; and the greatest of all.
struct Spread {
  double least;
  double low;
  double high;
  double greatest;
};

inline Spread spread_of(const PartedEdges<float>& parted, int64_t count) {
  const float* edges = parted.edges.data();
  const auto is_finite = [](float edge) { return edge <= std::numeric_limits<float>::max(); };
  if (parted.parts.size() == 1) {
    const int64_t last = std::partition_point(edges, edges + count, is_finite) - edges - 1, low = last / 16;
    return {edges[0], edges[low], edges[last - low], edges[count - 1]};
  }
  std::vector<float> unsorted;
  std::copy_if(edges, edges + count, std::back_inserter(unsorted), is_finite);
  const int64_t last = static_cast<int64_t>(unsorted.size()) - 1, low = last / 16;
  const auto quantile = [&](int64_t rank) {
    std::nth_element(unsorted.begin(), unsorted.begin() + rank, unsorted.end());
    return unsorted[rank];
  };
  const auto extremes = std::minmax_element(edges, edges + count);
  return {*extremes.first, quantile(low), quantile(last - low), *extremes.second};
}

// One grid for all parts, each of which has all its cells. Many cells per edge leave few cells with several edges; fewer when
// there are not enough elements to pay for writing them.
inline CellGrid make_grid(const PartedEdges<float>& parted, int64_t cells_per_edge, int64_t elements) {
  const int64_t parts = parted.num_ranked();
  const int64_t count = parted.parts[parts - 1].end;
  const int64_t wanted =
      std::max<int64_t>(64, std::min<int64_t>(cells_per_edge * count, std::max<int64_t>(elements / 8, 2 * count)));
  const int64_t cells = std::max<int64_t>(16, std::min(wanted, kMostCells) / parts);
  // The whole range of the edges, unless a few outliers stretch it far beyond the bulk: then they share the outermost cells.
  const Spread spread = spread_of(parted, count);
  const double reach = 4 * (spread.high - spread.low);
  const double from = std::max(spread.least, spread.low - reach), to = std::min(spread.greatest, spread.high + reach);
  // The ends in cells must be finite floats, also where all edges are one large number.
  const double width = std::max({to - from, 1e-25, 1e-30 * std::max(std::fabs(from), std::fabs(to))});
  CellGrid grid;
  grid.scale = static_cast<float>(std::exp2(std::floor(std::log2(static_cast<double>(cells) / width))));
  grid.origin = std::floor(static_cast<float>(from) * grid.scale);
  grid.last_cell = std::floor(std::fmin(static_cast<float>(to) * grid.scale - grid.origin, static_cast<float>(cells))) + 1;
  grid.top = std::min((grid.origin + grid.last_cell + 1) / grid.scale, std::numeric_limits<float>::max());
  grid.width = 1 / static_cast<double>(grid.scale);
  grid.cuts_low = from > spread.least;
  grid.cuts_high = to < spread.greatest;
  return grid;
}

// Calls clean(part, first cell, one past the last, edges before) and occupied(part, cell, first edge, one past the last) in
// ascending order, for the cells of all parts from number `from` to one before `to`.
template <class Clean, class Occupied>
void for_cells(const CellGrid& grid, const PartedEdges<float>& parted, int64_t from, int64_t to, const Clean& clean,
               const Occupied& occupied) {
  const int64_t part_cells = num_cells(grid);
  for (int64_t part = from / part_cells; part * part_cells < to; ++part) {
    const int32_t begin = static_cast<int32_t>(std::max(from - part * part_cells, int64_t{0}));
    const int32_t end = static_cast<int32_t>(std::min(to - part * part_cells, part_cells));
    const float* edges = parted.edges.data();
    const EdgePart range = parted.parts[part];
    int32_t cell = begin;
    int32_t edge = static_cast<int32_t>(std::partition_point(edges + range.first, edges + range.end,
                                                             [&](float value) { return cell_of(grid, value) < begin; }) -
                                        edges);
    while (edge < range.end) {
      const int32_t at = cell_of(grid, edges[edge]), first = edge;
      if (at >= end) break;
      if (cell < at) clean(part, cell, at, edge);
      while (edge < range.end && cell_of(grid, edges[edge]) == at) ++edge;
      occupied(part, at, first, edge);
      cell = at + 1;
    }
    if (cell < end) clean(part, cell, end, edge);
  }
}

}  // namespace rsloss
