// Streams the negatives into the bins between the breakpoints.
#include "ranking/ranking_stream.cuh"
#include "ranking/ranking_value_kernels.cuh"

namespace rsloss {
namespace {

// 64-bit sums in shared memory as two halves, because a native 64-bit atomic does not exist there (it is a compare-and-swap
// loop). A wrap of the low half carries into the high one. fixed_point_bits() keeps the sum of all elements below 2^63, so
// neither the high half nor, below 2^32 elements per block, the count ever wraps.
struct SharedSums {
  uint32_t* low;
  uint32_t* high;

  __device__ SharedSums(void* memory, int entries) : low(static_cast<uint32_t*>(memory)), high(low + entries) {}
  __device__ __forceinline__ void clear(int entry) const { low[entry] = high[entry] = 0; }
  __device__ __forceinline__ void add(int entry, uint64_t offset) const {
    const uint32_t add_low = static_cast<uint32_t>(offset);
    const uint32_t before = atomicAdd(&low[entry], add_low);
    const uint32_t carry = before + add_low < before ? 1 : 0;
    const uint32_t add_high = static_cast<uint32_t>(offset >> 32) + carry;
    if (add_high != 0) atomicAdd(&high[entry], add_high);
  }
  __device__ __forceinline__ uint64_t get(int entry) const { return (static_cast<uint64_t>(high[entry]) << 32) + low[entry]; }
};

constexpr int kMaxReplicas = 32;
constexpr int64_t kBinBytes = sizeof(uint64_t) + sizeof(uint32_t);  // sum and count

// Bytes of shared memory for the bins of `edges` breakpoints in `replicas` copies, with the edges themselves and the cells.
template <class T>
RSL_HOST_DEVICE int64_t bin_shared_bytes(int64_t edges, int64_t replicas) {
  return kStartsBytes + edges * (replicas * kBinBytes + static_cast<int64_t>(sizeof(T)));
}

// Calls add(k, offset) for every negative at or above the first edge of its segment: k is the edge left of it, offset its
// fixed-point distance from there. Returns the thread's number of NaN negatives.
template <class Element, int kVector, class Locate, class Add>
__device__ __forceinline__ uint64_t locate_negatives(const LogitsLevel& level, const Locate& locator,
                                                     const FixedPoint<Arithmetic<Element>>& fixed_point, Add add) {
  using T = Arithmetic<Element>;
  using Cursor = typename Locate::Cursor;
  unsigned nans = 0;
  stream_negatives<Element, kVector, Cursor>(level, [&](Element element, const Cursor& cursor) {
    const T value = widen(element);
    if (isnan(value)) ++nans;
    const int k = locator.find(value, cursor.id());
    if (k < 0) return;
    const double distance = static_cast<double>(value) - static_cast<double>(locator.edges[k]);
    add(k, static_cast<uint64_t>(fixed_point_offset(distance, fixed_point.scale, fixed_point.most)));
  });
  return nans;
}

// Streams the logits (sizeof(Element) + 1/8 bytes per element) and adds every negative at or above the first edge of its
// segment to its bin, in shared memory; adds the block's bins to the global ones (2 atomics per non-empty bin). Small tables
// are replicated: lanes of a warp that meet in one bin (P = 1: all of them) would queue up. Tables that do not fit go to the
// global bins element by element.
template <class Element, int kVector, bool kSegmented>
__global__ void __launch_bounds__(kLargeBlock, 1)
    ranking_bin_kernel(LogitsLevel level, const int64_t* counts, int64_t capacity, Breakpoints<Arithmetic<Element>> breakpoints,
                       double widest, int shared_bytes, int64_t* bins) {
  wait_for_previous_kernel();
  using T = Arithmetic<Element>;
  RSL_DYNAMIC_SHARED(memory);
  int64_t* const bin_counts = bins + 1;
  int64_t* const bin_sums = bins + (2 * capacity + 1) + 1;
  const FixedPoint<T> fixed_point(widest, counts);
  const int num_edges = 2 * valid_positives(breakpoints.segments);
  int replicas = num_edges > 0 ? kMaxReplicas : 0;
  while (replicas > 0 && bin_shared_bytes<T>(num_edges, replicas) > shared_bytes) replicas /= 2;
  EdgeLocator<T, T, kSegmented> locator = {};
  if (replicas == 0) {
    locator.build(breakpoints.edges, num_edges, breakpoints.segments, memory);
    const auto add = [=](int k, uint64_t offset) {
      add_to_bin(bin_counts + k, 1);
      add_to_bin(bin_sums + k, offset);
    };
    add_to_bin(bins, locate_negatives<Element, kVector>(level, locator, fixed_point, add));
    return;
  }

  const int entries = replicas * num_edges;
  const SharedSums sums(memory, entries);
  T* const edges = reinterpret_cast<T*>(memory + sizeof(uint64_t) * entries);
  uint32_t* const shared_counts = reinterpret_cast<uint32_t*>(edges + num_edges);
#pragma unroll 1
  for (int k = threadIdx.x; k < entries; k += blockDim.x) {
    sums.clear(k);
    shared_counts[k] = 0;
    if (k < num_edges) edges[k] = breakpoints.edges[k];
  }
  __syncthreads();
  locator.build(edges, num_edges, breakpoints.segments, shared_counts + entries);
  const int replica = static_cast<int>(threadIdx.x % replicas) * num_edges;
  const auto add = [=](int k, uint64_t offset) {
    atomicAdd(&shared_counts[replica + k], 1u);
    sums.add(replica + k, offset);
  };
  add_to_bin(bins, locate_negatives<Element, kVector>(level, locator, fixed_point, add));
  __syncthreads();
#pragma unroll 1
  for (int k = threadIdx.x; k < num_edges; k += blockDim.x) {
    uint64_t count = 0;
    uint64_t sum = 0;
#pragma unroll 1
    for (int r = 0; r < replicas; ++r) {
      count += shared_counts[r * num_edges + k];
      sum += sums.get(r * num_edges + k);
    }
    add_to_bin(bin_counts + k, count);
    add_to_bin(bin_sums + k, sum);
  }
}

template <class T>
struct BinWorkspace {
  Breakpoints<T> breakpoints;
  void* rank;
  uint32_t* histogram;  // [kValues], for 16-bit logits

  BinWorkspace(Workspace* workspace, Type logits_type, int64_t capacity, int32_t num_segments)
      : breakpoints(Breakpoints<T>::take(workspace, capacity, num_segments)),
        rank(workspace->take<char>(rank_workspace_bytes(capacity))),
        histogram(workspace->take<uint32_t>(is_16_bit(logits_type) ? kValues : 0)) {}
};

template <class Element, int kVector>
auto bin_kernel(bool is_segmented) {
  return is_segmented ? ranking_bin_kernel<Element, kVector, true> : ranking_bin_kernel<Element, kVector, false>;
}

template <class Element>
cudaError_t launch_bin_typed(const LogitsLevel* levels, int num_levels, Type logits_type, const double* positives,
                             const int64_t* counts, int64_t capacity, int32_t num_segments, double delta, double* ranked,
                             int64_t* bins, void* workspace, cudaStream_t stream) {
  using T = Arithmetic<Element>;
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  Workspace memory(workspace);
  const BinWorkspace<T> tables(&memory, logits_type, capacity, num_segments);
  const bool by_value = sizeof(Element) == 2 && is_by_value(count_elements(levels, num_levels), num_segments);
  RSL_RETURN_IF_ERROR(launch_rank(positives, counts, capacity, num_segments, ranked, bins, tables.histogram,
                                  by_value ? kValues : 0, tables.rank, stream));
  RSL_RETURN_IF_ERROR(launch_breakpoints<T>(ranked, counts, capacity, delta, tables.breakpoints, stream));

  const double widest = fixed_point_unit(delta, 0);
  if constexpr (sizeof(Element) == 2) {
    if (by_value) {
      return launch_value_bin<Element>(levels, num_levels, counts, capacity, tables.breakpoints, widest, bins, tables.histogram,
                                       stream);
    }
  }
  const int64_t most_shared = bin_shared_bytes<T>(2 * capacity, launch_options.most_replicas);
  for (int i = 0; i < num_levels; ++i) {
    const LogitsLevel& level = levels[i];
    if (level.elements == 0) continue;
    const bool is_vector = is_aligned(level.logits);
    const auto kernel =
        is_vector ? bin_kernel<Element, kFullVector<Element>>(num_segments > 1) : bin_kernel<Element, 1>(num_segments > 1);
    StreamShape shape;
    RSL_RETURN_IF_ERROR(
        stream_shape(kernel, level.elements, is_vector ? kFullVector<Element> : 1, most_shared, true, limits, &shape));
    RSL_RETURN_IF_ERROR(launch_dependent(kernel, shape.grid, shape.threads, shape.shared, stream, level, counts, capacity,
                                         tables.breakpoints, widest, static_cast<int>(shape.shared), bins));
  }
  return cudaSuccess;
}

}  // namespace

int64_t bin_workspace_bytes(Type logits_type, int64_t capacity, int32_t num_segments) {
  Workspace workspace(nullptr);
  if (logits_type == Type::kDouble) {
    BinWorkspace<double>(&workspace, logits_type, capacity, num_segments);
  } else {
    BinWorkspace<float>(&workspace, logits_type, capacity, num_segments);
  }
  return workspace.bytes();
}

cudaError_t launch_ranking_bin(const LogitsLevel* levels, int num_levels, Type logits_type, const double* positives,
                               const int64_t* counts, int64_t capacity, int32_t num_segments, double delta, double* ranked,
                               int64_t* bins, void* workspace, cudaStream_t stream) {
  const auto typed = logits_type == Type::kHalf       ? launch_bin_typed<__half>
                     : logits_type == Type::kBFloat16 ? launch_bin_typed<__nv_bfloat16>
                     : logits_type == Type::kFloat    ? launch_bin_typed<float>
                                                      : launch_bin_typed<double>;
  return typed(levels, num_levels, logits_type, positives, counts, capacity, num_segments, delta, ranked, bins, workspace,
               stream);
}

}  // namespace rsloss
