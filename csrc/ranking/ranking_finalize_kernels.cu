// The stages of a finalizer that know nothing of its loss. Scans run in tiles of one block, in one launch: every block first
// adds up what lies before its tile, so that none waits for another.
#include "ranking/ranking_breakpoints.cuh"
#include "ranking/ranking_finalize.cuh"

namespace rsloss {
namespace {

// Sum of term(i) over [first, last) by a block, in an order that depends on the range alone.
template <class Value, class Term>
__device__ __forceinline__ Value range_sum(int first, int last, Value* scratch, Term term) {
  Value sum = 0;
  for (int i = first + static_cast<int>(threadIdx.x); i < last; i += blockDim.x) sum += term(i);
  return block_sum(sum, scratch);
}

// The first blocks write the breakpoints. The others count the negatives before every slot, a tile each: they read the counts
// before the tile and in it, 8 bytes each, and write as much.
template <class T, bool kSegmented>
__global__ void __launch_bounds__(kLargeBlock, 1) ranking_sweep_kernel(Sweep<T> sweep, int breakpoint_blocks) {
  wait_for_previous_kernel();
  __shared__ uint64_t scratch[kLargeBlock / kWarp];
  const int block = static_cast<int>(blockIdx.x);
  if (block < breakpoint_blocks) {
    write_breakpoints<T, kSegmented>(sweep.ranked, sweep.counts, sweep.capacity, sweep.delta, sweep.breakpoints,
                                     static_cast<int>(grid_thread()), breakpoint_blocks * kLargeBlock);
    return;
  }
  const int slots = 2 * (kSegmented ? sweep.valid() : valid_positives(sweep.ranked, sweep.counts, sweep.capacity));
  const int first = (block - breakpoint_blocks) * kLargeBlock;
  if (first > slots) return;
  const auto count = [&sweep](int k) { return static_cast<uint64_t>(sweep.bins[1 + k]); };
  const uint64_t before = range_sum(0, first, scratch, count);
  const int slot = first + static_cast<int>(threadIdx.x);
  uint64_t total;
  const uint64_t inside = block_exclusive_scan(slot < slots ? count(slot) : 0, scratch, &total);
  if (slot <= slots) sweep.before_slot[slot] = before + inside;
}

// Running sums of the coefficients: reads those of the segment before the tile and the tile. The first block also adds up the
// errors, 8 bytes and a division each.
template <class T>
__global__ void __launch_bounds__(kLargeBlock, 1)
    ranking_losses_kernel(Sweep<T> sweep, const double* first_error, const double* second_error, T* first_loss,
                          T* second_loss) {
  wait_for_previous_kernel();
  __shared__ double scratch[kLargeBlock / kWarp];
  __shared__ Run runs[kLargeBlock / kWarp];
  const int valid = sweep.valid();
  if (blockIdx.x == 0) {
    const bool is_broken =
        sweep.counts[kFound] > sweep.capacity || sweep.bins[0] > 0 || valid < used_columns(sweep.counts, sweep.capacity);
    const double holders = valid > 0 ? *sweep.breakpoints.segments.holders : 1;
    for (int loss = 0; loss < (second_error == nullptr ? 1 : 2); ++loss) {
      const double* const error = loss == 0 ? first_error : second_error;
      const double sum = range_sum(0, valid, scratch, [=](int i) {
        const Span span = sweep.span(i);
        return error[i] / static_cast<double>(span.last - span.first);
      });
      if (threadIdx.x == 0) *(loss == 0 ? first_loss : second_loss) = static_cast<T>(is_broken ? NAN : sum / holders);
    }
  }
  const int first = static_cast<int>(blockIdx.x) * kLargeBlock;
  if (first >= valid) return;
  const double* const coefficient = sweep.coefficient;
  const double carry = range_sum(sweep.span(first).first, first, scratch, [=](int i) { return coefficient[i]; });
  const int i = first + static_cast<int>(threadIdx.x);
  const bool is_first = i < valid && sweep.span(i).first == i;
  const double through = block_running(i < valid ? coefficient[i] : 0, is_first, carry, runs,
                                       [](double before, double here) { return before + here; });
  if (i < valid) sweep.through[i] = through;
}

// Reads 24 bytes per window that is open at a breakpoint, writes 48 + 48 bytes per column of the capacity.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) ranking_tables_kernel(Sweep<T> sweep) {
  wait_for_previous_kernel();
  const int valid = sweep.valid();
  for (int i = grid_warp(); i < valid; i += grid_warps()) write_lines_of(sweep, i);
  write_remaining(sweep, 1);
}

}  // namespace

template <class T>
cudaError_t launch_sweep(const Sweep<T>& sweep, cudaStream_t stream) {
  const bool is_segmented = sweep.breakpoints.segments.count > 1;
  if (is_segmented) {
    RSL_RETURN_IF_ERROR(launch_segment_offsets(sweep.ranked + kSegment * sweep.capacity, sweep.ranked + kLogit * sweep.capacity,
                                               sweep.counts, sweep.capacity, sweep.breakpoints.segments, stream));
  }
  const auto kernel = is_segmented ? ranking_sweep_kernel<T, true> : ranking_sweep_kernel<T, false>;
  // A thread per positive of the capacity; without any, the table of segments is written all the same.
  const int64_t breakpoint_blocks = std::max<int64_t>(1, ceil_div(sweep.capacity, kLargeBlock));
  const int64_t tiles = ceil_div(2 * sweep.capacity + 1, kLargeBlock);
  return launch_dependent(kernel, breakpoint_blocks + tiles, kLargeBlock, 0, stream, sweep, breakpoint_blocks);
}

template <class T>
cudaError_t launch_losses(const Sweep<T>& sweep, const double* first_error, const double* second_error, T* first, T* second,
                          cudaStream_t stream) {
  // At least one block, which writes the losses.
  const int64_t tiles = std::max<int64_t>(1, ceil_div(sweep.capacity, kLargeBlock));
  return launch_dependent(ranking_losses_kernel<T>, tiles, kLargeBlock, 0, stream, sweep, first_error, second_error, first,
                          second);
}

template <class T>
cudaError_t launch_tables(const Sweep<T>& sweep, cudaStream_t stream) {
  if (sweep.capacity == 0) return cudaSuccess;
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  return launch_dependent(ranking_tables_kernel<T>, warp_grid(sweep.capacity, limits), kThreads, 0, stream, sweep);
}

template cudaError_t launch_sweep<float>(const Sweep<float>&, cudaStream_t);
template cudaError_t launch_sweep<double>(const Sweep<double>&, cudaStream_t);
template cudaError_t launch_losses<float>(const Sweep<float>&, const double*, const double*, float*, float*, cudaStream_t);
template cudaError_t launch_losses<double>(const Sweep<double>&, const double*, const double*, double*, double*, cudaStream_t);
template cudaError_t launch_tables<float>(const Sweep<float>&, cudaStream_t);
template cudaError_t launch_tables<double>(const Sweep<double>&, cudaStream_t);

}  // namespace rsloss
