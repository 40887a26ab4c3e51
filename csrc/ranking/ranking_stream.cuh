// How bin and backward stream over the logits: 16 bytes per thread and load, the mask beside, and the search for the edge left
// of a value.
#pragma once

#include <type_traits>

#include "ranking/ranking_device.cuh"
#include "ranking/ranking_segments.cuh"

namespace rsloss {

template <class Element, int kVector>
struct alignas(sizeof(Element) * kVector) Pack {
  Element values[kVector];
};

// 16 bytes per thread and load.
template <class Element>
constexpr int kFullVector = 16 / sizeof(Element);

// Elements [group * kVector, ...) and their mask bits; behind the end zeros.
template <class Element, int kVector>
struct Group {
  Pack<Element, kVector> pack;
  unsigned negative;

  __device__ __forceinline__ void load(const Element* elements, const uint8_t* negatives, int64_t count, int64_t group) {
    const int64_t first = group * kVector;
    negative = 0;
    if (first >= count) return;
    negative = (negatives[first / 8] >> (first % 8)) & ((1u << kVector) - 1);
    if (first + kVector <= count) {
      pack = *reinterpret_cast<const Pack<Element, kVector>*>(elements + first);
      return;
    }
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (first + v < count) {
        pack.values[v] = elements[first + v];
      } else {
        negative &= ~(1u << v);
      }
    }
  }
};

// Finds the last of `count` ascending edges at or below a value in about one step: a uniform grid of cells between the first
// and the last edge narrows it to the edges of one cell, bisection does the rest. cell() is monotone, and the same operations
// place values and edges, so this is exact whatever the rounding. starts[c] = number of edges in cells before c.
constexpr int kCells = 4096;
constexpr int kStartsBytes = (kCells + 4) * static_cast<int>(sizeof(uint32_t));

// T: type of values; Stored: type of the edges, which hold values of T.
template <class T, class Stored>
struct Locator {
  using Cursor = OneSegment;

  const Stored* edges;
  uint32_t* starts;  // shared, [kCells + 1]
  T first;
  T scale;

  __device__ __forceinline__ int cell(T value) const {
    const T position = (value - first) * scale;
    // inf * 0 belongs to the last cell: such a value lies above every edge of another cell.
    return position < static_cast<T>(kCells - 1) ? static_cast<int>(position) : kCells - 1;
  }

  // By all threads of a block. Ends with a barrier if there is an edge.
  __device__ __forceinline__ void build(const Stored* sorted, int count, const SegmentTable&, void* shared) {
    edges = sorted;
    starts = static_cast<uint32_t*>(shared);
    if (count == 0) {
      // No value is at or above it.
      first = static_cast<T>(NAN);
      return;
    }
    first = static_cast<T>(edges[0]);
    scale = static_cast<T>(kCells) / (static_cast<T>(edges[count - 1]) - first);
    for (int c = threadIdx.x; c <= kCells; c += blockDim.x) {
      starts[c] = static_cast<uint32_t>(partition_point(count, [&](int k) { return cell(static_cast<T>(edges[k])) >= c; }));
    }
    __syncthreads();
  }

  // The number of the edge; -1 if there is none, or for NaN.
  __device__ __forceinline__ int find(T value, int32_t) const {
    if (!(value >= first)) return -1;
    const int at = cell(value);
    int low = static_cast<int>(starts[at]);
    int high = static_cast<int>(starts[at + 1]);
    while (low < high) {
      const int middle = (low + high) / 2;
      if (static_cast<T>(edges[middle]) <= value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low - 1;
  }
};

// The same inside a segment, whose edges are fewer: bisection alone.
template <class T, class Stored>
struct SegmentLocator {
  using Cursor = SegmentCursor;

  const Stored* edges;
  SegmentTable segments;

  __device__ __forceinline__ void build(const Stored* sorted, int, const SegmentTable& table, void*) {
    edges = sorted;
    segments = table;
  }

  // -1 also for an element that is ignored.
  __device__ __forceinline__ int find(T value, int32_t segment) const {
    if (segment < 0) return -1;
    const int first = 2 * segments.offsets[segment];
    const int count = 2 * segments.offsets[segment + 1] - first;
    const int below = partition_point(count, [&](int k) { return !(static_cast<T>(edges[first + k]) <= value); });
    return below == 0 ? -1 : first + below - 1;
  }
};

template <class T, class Stored, bool kSegmented>
using EdgeLocator = std::conditional_t<kSegmented, SegmentLocator<T, Stored>, Locator<T, Stored>>;

// kUnroll groups are loaded before any is used: with one block of 1024 threads per processor 32 KiB are in flight.
constexpr int kUnroll = 2;

// One block per processor, or as many as its threads and shared memory hold: tables are set up once per block and the logits
// are walked in strides of the grid. Small inputs take a block per kUnroll groups of threads.
inline int64_t stream_grid(int64_t elements, int vector, int64_t shared_bytes, const DeviceLimits& limits) {
  // A block's own bookkeeping takes 1 KiB of the processor's shared memory.
  const int64_t resident = std::max<int64_t>(
      1, std::min<int64_t>(limits.threads_per_processor / kLargeBlock, limits.shared_per_processor / (shared_bytes + 1024)));
  return std::min(ceil_div(elements, static_cast<int64_t>(vector) * kUnroll * kLargeBlock), limits.processors * resident);
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace rsloss
