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
    // Of edges that do not ascend, which only a caller of the operators can hand in, any cell, but one of the grid.
    scale = fmax(static_cast<T>(kCells) / (static_cast<T>(edges[count - 1]) - first), static_cast<T>(0));
    const auto is_in = [&](T edge, int c) { return edge >= first && cell(edge) >= c; };
    for (int c = threadIdx.x; c <= kCells; c += blockDim.x) {
      starts[c] = static_cast<uint32_t>(partition_point(count, [&](int k) { return is_in(static_cast<T>(edges[k]), c); }));
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

// Bisection alone, over all edges.
template <class T, class Stored>
struct BisectLocator {
  using Cursor = OneSegment;

  const Stored* edges;
  int count;

  __device__ __forceinline__ int find(T value, int32_t) const {
    return partition_point(count, [&](int k) { return !(static_cast<T>(edges[k]) <= value); }) - 1;
  }
};

// The same inside a segment, which has few.
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
    const int k = BisectLocator<T, Stored>{edges + first, count}.find(value, segment);
    return k < 0 ? -1 : first + k;
  }
};

template <class T, class Stored, bool kSegmented>
using EdgeLocator = std::conditional_t<kSegmented, SegmentLocator<T, Stored>, Locator<T, Stored>>;

// kUnroll groups are loaded before any is used: with one block of 1024 threads per processor 32 KiB are in flight.
constexpr int kUnroll = 2;

__device__ __forceinline__ void add_to_bin(int64_t* bin, uint64_t value) {
  if (value != 0) atomicAdd(reinterpret_cast<unsigned long long*>(bin), static_cast<unsigned long long>(value));
}

// Calls visit(element, cursor) for every negative of one tensor: sizeof(Element) + 1/8 bytes per element.
template <class Element, int kVector, class Cursor, class Visit>
__device__ __forceinline__ void stream_negatives(const LogitsLevel& level, Visit visit) {
  const Element* const logits = static_cast<const Element*>(level.logits);
  const int64_t groups = (level.elements + kVector - 1) / kVector;
  for (int64_t group = grid_thread(); group < groups; group += kUnroll * grid_threads()) {
    Group<Element, kVector> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u].load(logits, level.negatives, level.elements, group + u * grid_threads());
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (loaded[u].negative == 0) continue;
      Cursor cursor(level.segments, (group + u * grid_threads()) * kVector);
#pragma unroll
      for (int v = 0; v < kVector; ++v, cursor.next()) {
        if ((loaded[u].negative >> v & 1) != 0) visit(loaded[u].pack.values[v], cursor);
      }
    }
  }
}

// Streams the logits and writes gradient_of(element, is negative, cursor) of one tensor: (2 sizeof(Element) + 1/8) bytes per
// element.
template <class Element, int kVector, class Cursor, class Gradient>
__device__ __forceinline__ void stream_gradient(const BackwardLevel& level, Gradient gradient_of) {
  const Element* const logits = static_cast<const Element*>(level.logits);
  Element* const gradients = static_cast<Element*>(level.gradient);
  const int64_t groups = (level.elements + kVector - 1) / kVector;
  for (int64_t group = grid_thread(); group < groups; group += kUnroll * grid_threads()) {
    Group<Element, kVector> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u].load(logits, level.negatives, level.elements, group + u * grid_threads());
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t first = (group + u * grid_threads()) * kVector;
      if (first >= level.elements) continue;
      Cursor cursor(level.segments, first);
      Pack<Element, kVector> out;
#pragma unroll
      for (int v = 0; v < kVector; ++v, cursor.next()) {
        out.values[v] = gradient_of(loaded[u].pack.values[v], (loaded[u].negative >> v & 1) != 0, cursor);
      }
      if (first + kVector <= level.elements) {
        *reinterpret_cast<Pack<Element, kVector>*>(gradients + first) = out;
      } else {
        // Unrolled, so that the pack stays in registers.
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          if (first + v < level.elements) gradients[first + v] = out.values[v];
        }
      }
    }
  }
}

// The lines of the gradient in the type they are evaluated in.
template <class T, class Stored, class Locate>
struct Lines {
  Locate locator;
  const Stored* values;
  const Stored* slopes;

  __device__ __forceinline__ T operator()(T value, int32_t segment) const {
    if (isnan(value)) return value;
    const int k = locator.find(value, segment);
    if (k < 0) return 0;
    // A flat line may be infinitely long, or longer than the largest number; 0 times that would be NaN.
    const T slope = static_cast<T>(slopes[k]);
    const T distance = slope == 0 ? T(0) : value - static_cast<T>(locator.edges[k]);
    return static_cast<T>(values[k]) + slope * distance;
  }
};

// How a pass over the logits is launched: tables are set up once per block and the logits are walked in strides of the grid.
struct StreamShape {
  int threads;
  int64_t shared;  // bytes
  int64_t grid;
};

// One block per processor, as the registers of kLargeBlock threads allow, or what launch_options ask for where all of them fit.
// Small inputs take a block per kUnroll groups of threads. most_shared: bytes that more memory would not be of use beyond;
// may_split: the kernel takes what it gets.
template <class... Parameters>
cudaError_t stream_shape(void (*kernel)(Parameters...), int64_t elements, int vector, int64_t most_shared, bool may_split,
                         const DeviceLimits& limits, StreamShape* shape) {
  constexpr int kSplitBlock = 768;
  int64_t resident = 1;
  // Whole chunks of 16 bytes, as kernels store them.
  const auto at_most = [=](int64_t bytes) { return std::min<int64_t>(bytes / 16 * 16, most_shared); };
  *shape = {kLargeBlock, at_most(limits.shared_per_block), 0};
  if (may_split && launch_options.blocks_per_processor > 1) {
    const int wanted = launch_options.blocks_per_processor;
    // A block's own bookkeeping takes 1 KiB of the processor's shared memory.
    const int64_t shared = at_most(limits.shared_per_processor / wanted - 1024);
    int fitting;
    RSL_RETURN_IF_ERROR(allow_shared(kernel, shared));
    RSL_RETURN_IF_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, kernel, kSplitBlock, shared));
    if (fitting >= wanted) {
      *shape = {kSplitBlock, shared, 0};
      resident = wanted;
    }
  }
  shape->grid = std::min(ceil_div(elements, static_cast<int64_t>(vector) * kUnroll * shape->threads),
                         static_cast<int64_t>(limits.processors) * resident);
  return cudaSuccess;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace rsloss
