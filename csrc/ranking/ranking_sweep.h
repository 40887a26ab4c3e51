// What the two streaming passes of the CPU backend work on, and what they do with one element. The vector code in
// ranking_simd.h does the same with many. Bins are numbered by distinct breakpoints here: bin d has d of them at or below it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/parallel.h"
#include "ranking/cell_grid.h"
#include "ranking/ranking.h"
#include "ranking/segments_cpu.h"

namespace rsloss {

// Runs body(first cell, one past the last) on several threads.
template <class Body>
void for_cell_ranges(int64_t cells, const Body& body) {
  const int64_t tasks = task_count(cells, kCellsPerTask);
  run_tasks(tasks, [&](int64_t task) { body(task_begin(cells, tasks, task), task_begin(cells, tasks, task + 1)); });
}

// What the vector passes know of a part: its first breakpoint, and its first cell in their table.
struct alignas(8) PartEntry {
  float lowest;
  int32_t first_cell;
};

// Elements of several segments, from some element of a tensor on.
struct MixedSpan {
  SegmentLayout layout;
  const int32_t* part_of;     // [num_segments + 1]
  const PartEntry* entries;   // likewise; float32 only, like all below
  const float* lowest;        // [columns + kMixedElements] where every column has a segment, or none
  const int32_t* first_cell;  // likewise

  void write_parts(int64_t begin, int64_t count, int32_t* parts) const {
    layout.write_segments(begin, count, parts);
    for (int64_t i = 0; i < count; ++i) parts[i] = part_of[parts[i]];
  }
};

// The parts of all segments, as the passes look them up where segments are mixed.
template <class T>
class PartLookup {
 public:
  PartLookup(const SegmentMap& segments, const PartedEdges<T>& parted, int64_t part_cells)
      : segments_(segments), parted_(parted) {
    if (segments.is_single() || !std::is_same_v<T, float>) return;
    for (const int32_t part : parted.part_of)
      entries_.push_back({static_cast<float>(parted.lowest(part)), static_cast<int32_t>(part * part_cells)});
    const SegmentLayout layout = segments.layout(0);
    if (layout.period == 0 || layout.period > kMostColumns) return;
    for (int64_t i = 0; i < layout.period + kMixedElements; ++i) {
      const PartEntry entry = entries_[layout.segment(i % layout.period)];
      lowest_.push_back(entry.lowest);
      first_cell_.push_back(entry.first_cell);
    }
  }

  MixedSpan span(size_t level, int64_t begin) const {
    SegmentLayout layout = segments_.layout(level);
    layout.first += begin;
    const bool has_columns = !lowest_.empty();
    return {layout, parted_.part_of.data(), entries_.data(), has_columns ? lowest_.data() : nullptr,
            has_columns ? first_cell_.data() : nullptr};
  }

 private:
  static constexpr int64_t kMostColumns = 1 << 12;

  const SegmentMap& segments_;
  const PartedEdges<T>& parted_;
  std::vector<PartEntry> entries_;
  std::vector<float> lowest_;
  std::vector<int32_t> first_cell_;
};

struct alignas(16) BinSums {
  int64_t count;
  int64_t sum;
};

// Fixed-point offsets from an origin.
struct OffsetScale {
  double scale;  // 1 / unit; 0 for delta = 0
  double most;   // largest offset
};

// A cell: its only breakpoint (NaN if there is none) and the number of distinct breakpoints before it. A crowded cell has
// several: kCrowded is set, and the breakpoint's bits hold how many. With kBlurred too, however many there are, offsets from
// the grid's origin would not fit or lose digits.
struct BinCell {
  float breakpoint;
  uint32_t before;
};
constexpr uint32_t kCrowded = 0x80000000u;
constexpr uint32_t kBlurred = 0x40000000u;

inline BinCell crowded_cell(int32_t before, int32_t count, bool is_blurred) {
  BinCell cell{0, static_cast<uint32_t>(before) | kCrowded | (is_blurred ? kBlurred : 0)};
  __builtin_memcpy(&cell.breakpoint, &count, sizeof count);
  return cell;
}

// Few bins fit the first-level cache as one word each, which holds a count above a sum: one addition per element. A word must
// be emptied before it has taken more elements than its count can tell; many bins are not worth that.
constexpr int kPackedSumBits = 50;
constexpr int kPackedOffsetBits = 36;
constexpr int64_t kMostPacked = (int64_t{1} << (64 - kPackedSumBits)) - 1;
constexpr int32_t kMostPackedBins = 4096;

struct PackedSums {
  uint64_t* words;  // [bins]
  int32_t bins;     // edges + 1
  int64_t pending;  // elements that a word may hold
};

// Added to less than half of it, it leaves a rounded integer in the low bits of a double.
constexpr double kIntegerShift = 0x1.8p52;
constexpr uint64_t kIntegerShiftBits = 0x4338000000000000u;

template <class T>
struct BinPass;

template <>
struct BinPass<float> {
  const float* edges;     // of all parts
  const EdgePart* parts;  // from the one of all elements on, or the first one
  const BinCell* cells;   // likewise, [parts, part_cells]
  int32_t part_cells;
  float lowest;  // first edge of the first of these parts
  CellGrid grid;
  double far_scale;    // of the offsets in `sums` and `packed`, from the origin of the grid
  double shift;        // kIntegerShift - origin * far.scale
  PackedSums* packed;  // none where there are too many bins
  OffsetScale near;    // scale of the offsets in `searched`, from the left breakpoint of the bin
  BinSums* sums;       // [edges + 1]
  BinSums* searched;   // [edges + 1]
};

template <>
struct BinPass<double> {
  const double* edges;
  const EdgePart* parts;
  OffsetScale near;
  BinSums* searched;
};

inline void add(BinSums& bin, double distance, OffsetScale scale) {
  bin.count += 1;
  bin.sum += fixed_point_offset(distance, scale.scale, scale.most);
}

// `from` of the edges before `end` are at or below the value; it has edges of its part at or below it.
template <class T>
inline void bin_searched(const BinPass<T>& pass, int32_t end, int32_t from, T value) {
  const int32_t bin = count_edges(pass.edges, end, from, value);
  add(pass.searched[bin], static_cast<double>(value) - static_cast<double>(pass.edges[bin - 1]), pass.near);
}

// The bin of a value in a crowded cell; 0 where that did not do, and it went to the searched ones.
inline int32_t bin_crowded(const BinPass<float>& pass, BinCell cell, float value) {
  int32_t count;
  __builtin_memcpy(&count, &cell.breakpoint, sizeof count);
  const int32_t before = static_cast<int32_t>(cell.before & ~(kCrowded | kBlurred)), end = before + count;
  if (cell.before & kBlurred) {
    bin_searched<float>(pass, end, before, value);
    return 0;
  }
  // Mostly there are two, and no branch depends on the value.
  const int32_t bin = before + (value >= pass.edges[before] ? 1 : 0) + (value >= pass.edges[before + 1] ? 1 : 0);
  return count == 2 ? bin : count_edges(pass.edges, end, bin, value);
}

// The offset of a value from the grid's origin, rounded to far units. Beyond the grid it is garbage, which is never read.
inline int64_t far_offset(const BinPass<float>& pass, float value) {
  const double shifted = static_cast<double>(value < pass.grid.top ? value : pass.grid.top) * pass.far_scale + pass.shift;
  uint64_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  return static_cast<int64_t>(bits - kIntegerShiftBits);
}

inline void bin_one(const BinPass<float>& pass, int32_t part, float value) {
  if (!(value >= pass.edges[pass.parts[part].first])) return;
  const int32_t address = part * pass.part_cells + cell_of(pass.grid, value);
  const BinCell cell = pass.cells[address];
  const int32_t bin = cell.before & kCrowded ? bin_crowded(pass, cell, value)
                                             : static_cast<int32_t>(cell.before) + (value >= cell.breakpoint ? 1 : 0);
  if (bin > 0) {
    pass.sums[bin].count += 1;
    pass.sums[bin].sum += far_offset(pass, value);
  }
}

inline void bin_one(const BinPass<double>& pass, int32_t part, double value) {
  const int32_t first = pass.parts[part].first;
  if (value >= pass.edges[first]) bin_searched<double>(pass, pass.parts[part].end, first, value);
}

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
  const T* edges;         // of all parts
  const EdgePart* parts;  // from the one of all elements on, or the first one
  const Line<T>* lines;   // [edges + 1] by bin, upstream gradient folded in
  T lowest;               // first edge of the first of these parts
  CellGrid grid;          // float32 only, like all below
  const CellLine* cells;  // [parts, part_cells]
  int32_t part_cells;
};

// The same pass for elements of one part alone, which is number 0 then.
template <class Pass>
Pass pass_of_part(Pass pass, int32_t part) {
  pass.parts += part;
  if constexpr (!std::is_same_v<Pass, BinPass<double>>) pass.lowest = pass.edges[pass.parts->first];
  if constexpr (std::is_same_v<Pass, BinPass<float>> || std::is_same_v<Pass, GradientPass<float>>)
    pass.cells += int64_t{part} * pass.part_cells;
  return pass;
}

}  // namespace rsloss
