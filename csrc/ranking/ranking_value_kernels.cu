// Many 16-bit logits of one segment, by value.
//   histogram   streams the logits and counts every value
//   distribute  adds the count of every value to its bin, and as many times its offset: the same integers as one by one
//   table       the gradient of a negative of every value
//   look_up     streams the logits and looks their gradients up
#include "ranking/ranking_stream.cuh"
#include "ranking/ranking_value_kernels.cuh"

namespace rsloss {
namespace {

template <class Element>
__device__ __forceinline__ uint16_t bits_of(Element element) {
  uint16_t bits;
  memcpy(&bits, &element, sizeof bits);
  return bits;
}

// Ascends with the value.
template <class Element>
__device__ __forceinline__ uint32_t key_of(Element element) {
  const uint32_t bits = bits_of(element);
  return (bits & 0x8000u) != 0 ? ~bits & 0xffffu : bits | 0x8000u;
}

template <class Element>
__device__ __forceinline__ Element element_of(uint32_t key) {
  const uint16_t bits = static_cast<uint16_t>((key & 0x8000u) != 0 ? key & 0x7fffu : ~key);
  Element element;
  memcpy(&element, &bits, sizeof bits);
  return element;
}

// As many as one thread stores at once.
struct alignas(16) Words {
  uint32_t at[4];
};

// Streams the logits (2 + 1/8 bytes per element). The values from the first edge on are counted in shared memory as far as
// there is room, the rest in global memory; an increment by one is combined inside of a warp by the hardware.
template <class Element, int kVector>
__global__ void __launch_bounds__(kLargeBlock, 1)
    ranking_histogram_kernel(LogitsLevel level, Breakpoints<float> breakpoints, int shared_bytes, uint32_t* histogram,
                             int64_t* bins) {
  wait_for_previous_kernel();
  RSL_DYNAMIC_SHARED(memory);
  uint32_t* const shared = reinterpret_cast<uint32_t*>(memory);
  // Without an edge every comparison fails.
  const float first = valid_positives(breakpoints.segments) > 0 ? breakpoints.edges[0] : NAN;
  const uint32_t base = key_of(narrowed<Element>(first));
  const uint32_t room = static_cast<uint32_t>(shared_bytes) / sizeof(uint32_t);
  const uint32_t window = kValues - base < room ? kValues - base : room;
  for (uint32_t k = threadIdx.x; k < (window + 3) / 4; k += blockDim.x) reinterpret_cast<Words*>(shared)[k] = {};
  __syncthreads();
  unsigned nans = 0;
  stream_negatives<Element, kVector, OneSegment>(level, [&](Element element, const OneSegment&) {
    const float value = widen(element);
    if (isnan(value)) ++nans;
    if (!(value >= first)) return;
    const uint32_t key = key_of(element);
    // Below the base, where a zero has the other sign, the difference wraps.
    if (key - base < window) {
      atomicAdd(shared + (key - base), 1u);
    } else {
      atomicAdd(histogram + key, 1u);
    }
  });
  add_to_bin(bins, nans);
  __syncthreads();
  for (uint32_t k = threadIdx.x; k < window; k += blockDim.x) {
    if (shared[k] != 0) atomicAdd(histogram + base + k, shared[k]);
  }
}

// A thread per value: reads 4 bytes and log2(2V) cached edges, 2 atomics per value that occurs.
template <class Element>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_distribute_kernel(const uint32_t* histogram, const int64_t* counts, int64_t capacity,
                              Breakpoints<float> breakpoints, double widest, int64_t* bins) {
  wait_for_previous_kernel();
  const FixedPoint<float> fixed_point(widest, counts);
  const BisectLocator<float, float> locator = {breakpoints.edges, 2 * valid_positives(breakpoints.segments)};
  for (int64_t key = grid_thread(); key < kValues; key += grid_threads()) {
    const uint64_t count = histogram[key];
    if (count == 0) continue;
    const float value = widen(element_of<Element>(static_cast<uint32_t>(key)));
    const int k = locator.find(value, 0);
    if (k < 0) continue;
    const double distance = static_cast<double>(value) - static_cast<double>(locator.edges[k]);
    const uint64_t offset = static_cast<uint64_t>(fixed_point_offset(distance, fixed_point.scale, fixed_point.most));
    add_to_bin(bins + 1 + k, count);
    add_to_bin(bins + (2 * capacity + 1) + 1 + k, count * offset);
  }
}

// A thread per value: log2(2V) cached lines each, 2 bytes written.
template <class Element>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_value_table_kernel(const double* lines, const int64_t* counts, int64_t capacity, const float* upstream,
                               Element* table) {
  wait_for_previous_kernel();
  const float factor = upstream == nullptr ? 0 : *upstream;
  const Lines<float, double, BisectLocator<float, double>> of = {
      {lines, 2 * used_columns(counts, capacity)}, lines + kValue * 2 * capacity, lines + kSlope * 2 * capacity};
  for (int64_t key = grid_thread(); key < kValues; key += grid_threads()) {
    const Element element = element_of<Element>(static_cast<uint32_t>(key));
    table[bits_of(element)] = narrowed<Element>(of(widen(element), 0) * factor);
  }
}

// Streams the logits and writes their gradient: 4 + 1/8 bytes per element. The table lives in shared memory where it fits.
template <class Element, int kVector>
__global__ void __launch_bounds__(kLargeBlock, 1)
    ranking_look_up_kernel(BackwardLevel level, const int64_t* counts, int64_t capacity, const Element* table,
                           int shared_bytes) {
  wait_for_previous_kernel();
  RSL_DYNAMIC_SHARED(memory);
  const bool is_overflow = counts[kFound] > capacity;
  const Element other = narrowed<Element>(is_overflow ? NAN : 0.0f);
  const auto look_up_in = [&](const Element* values) {
    stream_gradient<Element, kVector, OneSegment>(level, [=](Element element, bool is_negative, const OneSegment&) {
      return is_negative && !is_overflow ? values[bits_of(element)] : other;
    });
  };
  // Two passes in the code, so that each knows which memory it reads.
  if (shared_bytes == 0) {
    look_up_in(table);
    return;
  }
  using Chunk = Pack<Element, kFullVector<Element>>;
  Chunk* const chunks = reinterpret_cast<Chunk*>(memory);
  for (int k = threadIdx.x; k < kValues / kFullVector<Element>; k += blockDim.x) {
    chunks[k] = reinterpret_cast<const Chunk*>(table)[k];
  }
  __syncthreads();
  look_up_in(reinterpret_cast<const Element*>(memory));
}

}  // namespace

template <class Element>
cudaError_t launch_value_bin(const LogitsLevel* levels, int num_levels, const int64_t* counts, int64_t capacity,
                             Breakpoints<float> breakpoints, double widest, int64_t* bins, uint32_t* histogram,
                             cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const int64_t grid = resident_grid(kValues / kThreads, limits);
  for (int i = 0; i < num_levels; ++i) {
    const LogitsLevel& level = levels[i];
    if (level.elements == 0) continue;
    const bool is_vector = is_aligned(level.logits);
    const auto kernel =
        is_vector ? ranking_histogram_kernel<Element, kFullVector<Element>> : ranking_histogram_kernel<Element, 1>;
    StreamShape shape;
    RSL_RETURN_IF_ERROR(stream_shape(kernel, level.elements, is_vector ? kFullVector<Element> : 1, kValues * sizeof(uint32_t),
                                     true, limits, &shape));
    RSL_RETURN_IF_ERROR(launch_dependent(kernel, shape.grid, shape.threads, shape.shared, stream, level, breakpoints,
                                         static_cast<int>(shape.shared), histogram, bins));
  }
  return launch_dependent(ranking_distribute_kernel<Element>, grid, kThreads, 0, stream, histogram, counts, capacity,
                          breakpoints, widest, bins);
}

template <class Element>
cudaError_t launch_value_backward(const BackwardLevel* levels, int num_levels, const double* lines, const int64_t* counts,
                                  int64_t capacity, const float* upstream, Element* table, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const int64_t grid = resident_grid(kValues / kThreads, limits);
  RSL_RETURN_IF_ERROR(launch_dependent(ranking_value_table_kernel<Element>, grid, kThreads, 0, stream, lines, counts, capacity,
                                       upstream, table));
  const int64_t table_bytes = kValues * static_cast<int64_t>(sizeof(Element));
  const int64_t shared = table_bytes <= limits.shared_per_block ? table_bytes : 0;
  for (int i = 0; i < num_levels; ++i) {
    const BackwardLevel& level = levels[i];
    if (level.elements == 0) continue;
    const bool is_vector = is_aligned(level.logits) && is_aligned(level.gradient);
    const auto kernel = is_vector ? ranking_look_up_kernel<Element, kFullVector<Element>> : ranking_look_up_kernel<Element, 1>;
    StreamShape shape;
    RSL_RETURN_IF_ERROR(
        stream_shape(kernel, level.elements, is_vector ? kFullVector<Element> : 1, shared, false, limits, &shape));
    RSL_RETURN_IF_ERROR(launch_dependent(kernel, shape.grid, shape.threads, shape.shared, stream, level, counts, capacity,
                                         table, static_cast<int>(shape.shared)));
  }
  return cudaSuccess;
}

template cudaError_t launch_value_bin<__half>(const LogitsLevel*, int, const int64_t*, int64_t, Breakpoints<float>, double,
                                              int64_t*, uint32_t*, cudaStream_t);
template cudaError_t launch_value_bin<__nv_bfloat16>(const LogitsLevel*, int, const int64_t*, int64_t, Breakpoints<float>,
                                                     double, int64_t*, uint32_t*, cudaStream_t);
template cudaError_t launch_value_backward<__half>(const BackwardLevel*, int, const double*, const int64_t*, int64_t,
                                                   const float*, __half*, cudaStream_t);
template cudaError_t launch_value_backward<__nv_bfloat16>(const BackwardLevel*, int, const double*, const int64_t*, int64_t,
                                                          const float*, __nv_bfloat16*, cudaStream_t);

}  // namespace rsloss
