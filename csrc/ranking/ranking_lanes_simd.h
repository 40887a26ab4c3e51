// The parts of neighbouring elements, lane by lane, where segments are mixed. Part of the bodies of the passes over the
// logits.
#include "ranking/ranking_simd.h"

#if RSL_ISA != 0

// One vector more than there are elements: the last entry of a row may be written beyond it.
struct LaneRoom {
  alignas(64) float lowest[kMixedElements + kLanes];
  alignas(64) int32_t first_cell[kMixedElements + kLanes];
};

struct Lanes {
  const float* lowest;
  const int32_t* first_cell;
};

static inline void store(int32_t* p, Floats bits) { store(reinterpret_cast<float*>(p), bits); }

// Of the elements [begin, begin + count) of the span, whole vectors, kMixedElements at most.
static inline Lanes lanes_of(const MixedSpan& span, int64_t begin, int64_t count, LaneRoom& room) {
  const SegmentLayout& layout = span.layout;
  if (span.lowest != nullptr) {
    const int64_t column = (layout.first + begin) % layout.period;
    return {span.lowest + column, span.first_cell + column};
  }
  if (layout.width < kLanes) {
    alignas(64) int32_t segments[kMixedElements];
    layout.write_segments(begin, count, segments);
    for (int64_t i = 0; i < count; i += kLanes) {
      const Entries entries = gather_pairs(span.entries, segments + i);
      store(room.lowest + i, as_floats(entries.first));
      store(room.first_cell + i, as_floats(entries.second));
    }
    return {room.lowest, room.first_cell};
  }
  int64_t place = (layout.first + begin) / layout.width, end = (place + 1) * layout.width - (layout.first + begin);
  for (int64_t from = 0; from < count; from = end, end += layout.width) {
    const PartEntry entry = span.entries[layout.segment(place++)];
    float bits;
    __builtin_memcpy(&bits, &entry.first_cell, sizeof bits);
    const Floats lowest = broadcast(entry.lowest), first_cell = broadcast(bits);
    for (int64_t i = from; i < end && i < count; i += kLanes) {
      store(room.lowest + i, lowest);
      store(room.first_cell + i, first_cell);
    }
  }
  return {room.lowest, room.first_cell};
}

#endif
