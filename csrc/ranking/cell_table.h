// Finds the breakpoint nearest below or above a logit with one look-up: a uniform grid over the breakpoints, each cell an 8-byte
// entry {breakpoint, index}. Exact: a logit and a breakpoint are put into cells by the same monotone float arithmetic.
//
// An entry describes its only breakpoint, or, in a cell without one, the last breakpoint before it; index = 2 * slot, to which the
// look-up adds [logit >= breakpoint]. A cell with several has the sign bit set and the number of its first edge; it is searched.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace rsloss {

struct CellEntry {
  float breakpoint;
  uint32_t index;
};

constexpr uint32_t kCrowded = 0x80000000u;

struct CellTable {
  const float* edges;      // [num_edges] ascending, distinct
  const int32_t* slots;    // [num_edges] last slot among the equal breakpoints of an edge
  int32_t num_edges;
  float origin;
  float scale;
  float last_cell;         // number of cells - 1
  const CellEntry* cells;
};

// Same arithmetic for logits and breakpoints, in scalar and vector code: subtract, multiply, clamp, truncate. NaN goes to cell 0.
inline int32_t cell_of(const CellTable& table, float value) {
  const float position = (value - table.origin) * table.scale;
  return static_cast<int32_t>(position > 0 ? (position < table.last_cell ? position : table.last_cell) : 0.0f);
}

struct Found {
  uint32_t index;    // 2 * slot + [value >= breakpoint]
  float breakpoint;
};

// The search inside a crowded cell, from its first edge upwards in doubling steps.
inline Found search_cell(const CellTable& table, uint32_t crowded, float value) {
  int32_t low = static_cast<int32_t>(crowded & ~kCrowded) - 1;  // edges up to here are <= value
  int32_t reach = 1;
  while (low + reach < table.num_edges && table.edges[low + reach] <= value) {
    low += reach;
    reach *= 2;
  }
  int32_t high = low + reach < table.num_edges ? low + reach : table.num_edges;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (table.edges[middle] <= value) low = middle; else high = middle;
  }
  const int32_t edge = low > 0 ? low : 0;
  return {2u * static_cast<uint32_t>(table.slots[edge]) + 1u, table.edges[edge]};
}

inline Found find(const CellTable& table, float value) {
  const CellEntry entry = table.cells[cell_of(table, value)];
  if (entry.index & kCrowded) return search_cell(table, entry.index, value);
  return {entry.index + (value >= entry.breakpoint ? 1u : 0u), entry.breakpoint};
}

// Owns the memory of a table: at most 16 cells of 8 bytes per breakpoint, plus 8 bytes per breakpoint.
class CellTableStorage {
 public:
  // breakpoints: ascending, not empty; elements: how many logits will be looked up.
  CellTableStorage(std::vector<float> breakpoints, int64_t elements)
      : edges_(std::move(breakpoints)), slots_(new int32_t[edges_.size()]) {
    int32_t used = 0;
    for (size_t slot = 0; slot < edges_.size(); ++slot) {
      if (used > 0 && edges_[used - 1] == edges_[slot]) --used;
      edges_[used] = edges_[slot];
      slots_[used++] = static_cast<int32_t>(slot);
    }
    table_.edges = edges_.data();
    table_.slots = slots_.get();
    table_.num_edges = used;
    build_cells(choose_cells(used, elements));
  }
  const CellTable& table() const { return table_; }

 private:
  // More cells mean fewer crowded ones, but must pay for being written, and should stay in the second-level cache.
  static int32_t choose_cells(int32_t edges, int64_t elements) {
    const int64_t wanted = std::min<int64_t>({8 * int64_t{edges}, std::max<int64_t>(elements / 16, 2 * int64_t{edges}), 1 << 18});
    int32_t cells = 64;
    while (cells < wanted) cells *= 2;
    return cells;
  }

  void build_cells(int32_t cells) {
    choose_range(cells);
    table_.last_cell = static_cast<float>(cells - 1);
    cells_.reset(new CellEntry[cells]);
    table_.cells = cells_.get();
    int32_t edge = 0;
    for (int32_t cell = 0; cell < cells; ++cell) {
      const int32_t first = edge;
      while (edge < table_.num_edges && cell_of(table_, edges_[edge]) == cell) ++edge;
      const int32_t nearest = edge > first ? first : std::max(first - 1, 0);
      const bool is_crowded = edge > first + 1;
      cells_[cell] = {edges_[nearest], is_crowded ? kCrowded | static_cast<uint32_t>(first)
                                                  : 2u * static_cast<uint32_t>(slots_[nearest])};
    }
  }

  // The whole range of the breakpoints, unless a few outliers stretch it far beyond the bulk: then they share the outermost cells.
  void choose_range(int32_t cells) {
    const int32_t last = table_.num_edges - 1;
    const double low = edges_[0], high = edges_[last];
    const double bulk_low = edges_[last / 16], bulk_high = edges_[last - last / 16];
    const double reach = 4 * (bulk_high - bulk_low);
    const double from = std::max(low, bulk_low - reach), to = std::min(high, bulk_high + reach);
    table_.origin = static_cast<float>(from);
    const double width = to - from;
    table_.scale = width > 1e-30 ? static_cast<float>(std::min((cells - 1) / width, 1e30)) : 0.0f;
  }

  CellTable table_{};
  std::vector<float> edges_;
  std::unique_ptr<int32_t[]> slots_;
  std::unique_ptr<CellEntry[]> cells_;
};

}  // namespace rsloss
