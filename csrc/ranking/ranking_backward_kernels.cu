// Streams the logits into their gradient: negatives from the lines, positives from the table.
#include "ranking/ranking_stream.cuh"
#include "ranking/ranking_value_kernels.cuh"

namespace rsloss {
namespace {

template <class T, class Stored, bool kSegmented>
using LinesOf = Lines<T, Stored, EdgeLocator<T, Stored, kSegmented>>;

template <class Element, int kVector, class Stored, class Locate>
__device__ __forceinline__ void stream_lines(const BackwardLevel& level,
                                             const Lines<Arithmetic<Element>, Stored, Locate>& lines,
                                             Arithmetic<Element> factor) {
  using Cursor = typename Locate::Cursor;
  stream_gradient<Element, kVector, Cursor>(level, [=](Element element, bool is_negative, const Cursor& cursor) {
    return narrowed<Element>(is_negative ? lines(widen(element), cursor.id()) * factor : 0);
  });
}

template <class T>
RSL_HOST_DEVICE int64_t lines_shared_bytes(int64_t count) {
  return kStartsBytes + kLineRows * static_cast<int64_t>(sizeof(T)) * count;
}

// Gradient of every element but the positives, which ranking_scatter_kernel writes next. The lines live in shared memory where
// they fit (3 sizeof(T) bytes per breakpoint), else they are read from the lines themselves, in double.
template <class Element, int kVector, bool kSegmented>
__global__ void __launch_bounds__(kLargeBlock, 1)
    ranking_backward_kernel(BackwardLevel level, const double* lines, const int64_t* counts, int64_t capacity,
                            SegmentTable segments, const Arithmetic<Element>* upstream, int shared_bytes) {
  wait_for_previous_kernel();
  using T = Arithmetic<Element>;
  RSL_DYNAMIC_SHARED(memory);
  if (counts[kFound] > capacity) {
    stream_gradient<Element, kVector, OneSegment>(
        level, [](Element, bool, const OneSegment&) { return narrowed<Element>(static_cast<T>(NAN)); });
    return;
  }
  const int count = 2 * used_columns(counts, capacity);
  const T factor = upstream == nullptr ? T(0) : *upstream;
  if (lines_shared_bytes<T>(count) <= shared_bytes) {
    T* const table = reinterpret_cast<T*>(memory + kStartsBytes);
    for (int k = threadIdx.x; k < kLineRows * count; k += blockDim.x) {
      table[k] = static_cast<T>(lines[k / count * 2 * capacity + k % count]);
    }
    __syncthreads();
    LinesOf<T, T, kSegmented> of = {{}, table + kValue * count, table + kSlope * count};
    of.locator.build(table, count, segments, memory);
    stream_lines<Element, kVector>(level, of, factor);
  } else {
    LinesOf<T, double, kSegmented> of = {{}, lines + kValue * 2 * capacity, lines + kSlope * 2 * capacity};
    of.locator.build(lines, count, segments, memory);
    stream_lines<Element, kVector>(level, of, factor);
  }
}

// Gradient of the positives of one tensor: reads 24 bytes per positive, writes one element each. Those of another tensor, or of
// another process, have an index outside of this one.
template <class Element>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_scatter_kernel(const double* table, const int64_t* counts, int64_t capacity, const Arithmetic<Element>* grad_first,
                           const Arithmetic<Element>* grad_second, int64_t elements, int64_t first_index, Element* gradients) {
  wait_for_previous_kernel();
  if (counts[kFound] > capacity) return;
  const double first = grad_first == nullptr ? 0 : *grad_first;
  const double second = grad_second == nullptr ? 0 : *grad_second;
  const int used = used_columns(counts, capacity);
  for (int64_t column = grid_thread(); column < used; column += grid_threads()) {
    const double element = table[kGradientIndex * capacity + column] - static_cast<double>(first_index);
    if (!(element >= 0 && element < static_cast<double>(elements))) continue;  // or NaN
    const double gradient = table[kFirst * capacity + column] * first + table[kSecond * capacity + column] * second;
    narrow(static_cast<Arithmetic<Element>>(gradient), &gradients[static_cast<int64_t>(element)]);
  }
}

template <class Element, int kVector>
auto backward_kernel(bool is_segmented) {
  return is_segmented ? ranking_backward_kernel<Element, kVector, true> : ranking_backward_kernel<Element, kVector, false>;
}

template <class Element>
cudaError_t launch_backward_typed(const BackwardLevel* levels, int num_levels, const double* gradients, const double* lines,
                                  const int64_t* counts, int64_t capacity, int32_t num_segments, const void* grad_first,
                                  const void* grad_second, void* workspace, cudaStream_t stream) {
  using T = Arithmetic<Element>;
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const T* const first = static_cast<const T*>(grad_first);
  const T* const second = static_cast<const T*>(grad_second);
  Workspace memory(workspace);
  SegmentTable segments = {};
  if (num_segments > 1) {
    segments = SegmentTable::take(&memory, num_segments);
    RSL_RETURN_IF_ERROR(
        launch_segment_offsets(gradients + kGradientSegment * capacity, nullptr, counts, capacity, segments, stream));
  }
  const bool by_value = sizeof(Element) == 2 && is_by_value(count_elements(levels, num_levels), num_segments);
  if constexpr (sizeof(Element) == 2) {
    Element* const table = memory.take<Element>(kValues);
    if (by_value) {
      RSL_RETURN_IF_ERROR(launch_value_backward<Element>(levels, num_levels, lines, counts, capacity, first, table, stream));
    }
  }
  const int64_t scatter_grid = resident_grid(ceil_div(capacity, kThreads), limits);
  for (int i = 0; i < num_levels; ++i) {
    const BackwardLevel& level = levels[i];
    if (level.elements == 0) continue;
    if (!by_value) {
      const bool is_vector = is_aligned(level.logits) && is_aligned(level.gradient);
      const auto kernel = is_vector ? backward_kernel<Element, kFullVector<Element>>(num_segments > 1)
                                    : backward_kernel<Element, 1>(num_segments > 1);
      StreamShape shape;
      RSL_RETURN_IF_ERROR(stream_shape(kernel, level.elements, is_vector ? kFullVector<Element> : 1,
                                       lines_shared_bytes<T>(2 * capacity), true, limits, &shape));
      RSL_RETURN_IF_ERROR(launch_dependent(kernel, shape.grid, shape.threads, shape.shared, stream, level, lines, counts,
                                           capacity, segments, first, static_cast<int>(shape.shared)));
    }
    if (scatter_grid == 0) continue;
    RSL_RETURN_IF_ERROR(launch_dependent(ranking_scatter_kernel<Element>, scatter_grid, kThreads, 0, stream, gradients, counts,
                                         capacity, first, second, level.elements, level.first_index,
                                         static_cast<Element*>(level.gradient)));
  }
  return cudaSuccess;
}

}  // namespace

int64_t backward_workspace_bytes(Type logits_type, int32_t num_segments) {
  Workspace workspace(nullptr);
  if (num_segments > 1) SegmentTable::take(&workspace, num_segments);
  if (is_16_bit(logits_type)) workspace.take<uint16_t>(kValues);
  return workspace.bytes();
}

cudaError_t launch_ranking_backward(const BackwardLevel* levels, int num_levels, Type logits_type, const double* gradients,
                                    const double* lines, const int64_t* counts, int64_t capacity, int32_t num_segments,
                                    const void* grad_first, const void* grad_second, void* workspace, cudaStream_t stream) {
  const auto typed = logits_type == Type::kHalf       ? launch_backward_typed<__half>
                     : logits_type == Type::kBFloat16 ? launch_backward_typed<__nv_bfloat16>
                     : logits_type == Type::kFloat    ? launch_backward_typed<float>
                                                      : launch_backward_typed<double>;
  return typed(levels, num_levels, gradients, lines, counts, capacity, num_segments, grad_first, grad_second, workspace,
               stream);
}

}  // namespace rsloss
