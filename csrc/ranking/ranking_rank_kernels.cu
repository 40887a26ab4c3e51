// Sorts the records, and merges the breakpoints of the valid ones.
//   rank         places every record inside its tile of the columns by counting those before it, a warp per record
//   merge        merges runs of records two by two, a thread per record; none where all columns are one tile
//   offsets      where each segment begins; not for a single segment
//   breakpoints  a merge of two ascending lists per segment
#include "ranking/ranking_breakpoints.cuh"

namespace rsloss {
namespace {

// Up to this many records counting (tile^2 / 32 cached loads per tile) costs less than what more launches would.
constexpr int64_t kRankTile = 16384;

// -1, 0 or 1; NaN stands after every number.
__device__ __forceinline__ int compare(double a, double b) {
  if (a < b) return -1;
  if (a > b) return 1;
  return static_cast<int>(isnan(a)) - static_cast<int>(isnan(b));
}

struct Records {
  const double* table;  // [4, capacity]
  int64_t capacity;

  // The order of record i against record j by (is NaN, segment, logit, quality); equal ones keep the order of their columns,
  // which is that of the flat index.
  __device__ __forceinline__ int compare_to(int i, int j) const {
    const double* const logit = table + kLogit * capacity;
    const int by_validity = static_cast<int>(isnan(logit[i])) - static_cast<int>(isnan(logit[j]));
    if (by_validity != 0) return by_validity;
    const double* const segment = table + kSegment * capacity;
    const int by_segment = compare(segment[i], segment[j]);
    if (by_segment != 0) return by_segment;
    const int by_logit = compare(logit[i], logit[j]);
    if (by_logit != 0) return by_logit;
    const double* const quality = table + kQuality * capacity;
    return compare(quality[i], quality[j]);
  }

  __device__ __forceinline__ void move(int i, int place, double* to) const {
#pragma unroll
    for (int row = 0; row < kRecordRows; ++row) to[row * capacity + place] = table[row * capacity + i];
  }
};

// Reads 8 bytes per pair of a tile, 16 with segments, and moves 32 bytes per record. Pads `ranked` (32 bytes per unused column)
// and clears the bins (32 bytes per column) and `histogram`.
template <bool kSegmented>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_rank_kernel(Records positives, const int64_t* counts, double* sorted, double* ranked, int64_t* bins,
                        uint32_t* histogram, int values) {
  wait_for_previous_kernel();
  const int64_t capacity = positives.capacity;
  const int used = used_columns(counts, capacity);
  const double* logit = positives.table + kLogit * capacity;
  const double* segment = positives.table + kSegment * capacity;
  const int lane = threadIdx.x % kWarp;
  for (int i = grid_warp(); i < used; i += grid_warps()) {
    const double own = logit[i];
    const double own_segment = kSegmented ? segment[i] : 0;
    const int first = i / static_cast<int>(kRankTile) * static_cast<int>(kRankTile);
    const int last = used - first < kRankTile ? used : first + static_cast<int>(kRankTile);
    int before = 0;
    for (int j = first + lane; j < last; j += kWarp) {
      const double other = logit[j];
      // Cheap tests settle almost every pair; a NaN on either side fails them and takes the long way.
      if (kSegmented && segment[j] != own_segment) {
        if (isfinite(other) && isfinite(own)) {
          before += segment[j] < own_segment;
          continue;
        }
      } else if (other > own) {
        continue;
      } else if (other < own) {
        ++before;
        continue;
      }
      const int order = positives.compare_to(j, i);
      before += order < 0 || (order == 0 && j < i);
    }
    const int place = first + warp_sum(before);
    if (lane < kRecordRows) sorted[lane * capacity + place] = positives.table[lane * capacity + i];
  }
  const int thread = static_cast<int>(grid_thread());
  const int threads = static_cast<int>(grid_threads());
  // Unrolling these would only cost registers.
#pragma unroll 1
  for (int column = used + thread; column < capacity; column += threads) write_padding(ranked, column, capacity);
#pragma unroll 1
  for (int k = thread; k < 2 * capacity + 1; k += threads) bins[k] = bins[2 * capacity + 1 + k] = 0;
#pragma unroll 1
  for (int k = thread; k < values; k += threads) histogram[k] = 0;
}

// Merges the sorted runs of `width` columns two by two: a record moves by the number of those of the other run before it. Reads
// log2(width) cached records and moves 32 bytes per record.
__global__ void __launch_bounds__(kThreads, 4)
    ranking_merge_kernel(Records runs, const int64_t* counts, int width, double* merged) {
  wait_for_previous_kernel();
  const int used = used_columns(counts, runs.capacity);
  for (int i = static_cast<int>(grid_thread()); i < used; i += static_cast<int>(grid_threads())) {
    const int run = i / width;
    const bool is_left = run % 2 == 0;
    // Below 2^30, as are the columns.
    const int64_t other = static_cast<int64_t>(run + (is_left ? 1 : -1)) * width;
    const int first = other < used ? static_cast<int>(other) : used;
    const int count = used - first < width ? used - first : width;
    // Equal records of the left run come first.
    const int before = partition_point(count, [&](int k) { return runs.compare_to(first + k, i) >= (is_left ? 0 : 1); });
    runs.move(i, is_left ? i + before : i - width + before, merged);
  }
}

// A thread per segment, log2(V) cached loads each; 4 bytes written.
__global__ void __launch_bounds__(kThreads, 4)
    ranking_offsets_kernel(const double* segment_of, const double* logit, const int64_t* counts, int64_t capacity,
                           SegmentTable segments) {
  wait_for_previous_kernel();
  const int used = used_columns(counts, capacity);
  for (int g = static_cast<int>(grid_thread()); g <= segments.count; g += static_cast<int>(grid_threads())) {
    segments.offsets[g] = partition_point(
        used, [&](int i) { return (logit != nullptr && isnan(logit[i])) || segment_of[i] >= static_cast<double>(g); });
  }
  if (grid_thread() == 0) *segments.holders = 0;
}

template <class T, bool kSegmented>
__global__ void __launch_bounds__(kThreads, 4)
    ranking_breakpoints_kernel(const double* ranked, const int64_t* counts, int64_t capacity, double delta,
                               Breakpoints<T> breakpoints) {
  wait_for_previous_kernel();
  write_breakpoints<T, kSegmented>(ranked, counts, capacity, delta, breakpoints, static_cast<int>(grid_thread()),
                                   static_cast<int>(grid_threads()));
}

int64_t num_merges(int64_t capacity) {
  int64_t merges = 0;
  for (int64_t width = kRankTile; width < capacity; width *= 2) ++merges;
  return merges;
}

}  // namespace

int64_t rank_workspace_bytes(int64_t capacity) {
  return num_merges(capacity) == 0 ? 0 : kRecordRows * capacity * static_cast<int64_t>(sizeof(double));
}

cudaError_t launch_rank(const double* positives, const int64_t* counts, int64_t capacity, int32_t num_segments, double* ranked,
                        int64_t* bins, uint32_t* histogram, int values, void* workspace, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const int64_t merges = num_merges(capacity);
  double* const other = static_cast<double*>(workspace);
  // The last merge ends in `ranked`.
  double* sorted = merges % 2 == 0 ? ranked : other;
  // A warp per positive; at least one block, because the bins have an entry without any capacity.
  const int64_t grid = std::max<int64_t>(1, resident_grid(ceil_div(capacity, kWarpsPerBlock), limits));
  const auto kernel = num_segments > 1 ? ranking_rank_kernel<true> : ranking_rank_kernel<false>;
  RSL_RETURN_IF_ERROR(launch_dependent(kernel, grid, kThreads, 0, stream, Records{positives, capacity}, counts, sorted, ranked,
                                       bins, histogram, values));
  int64_t width = kRankTile;
  for (int64_t merge = 0; merge < merges; ++merge, width *= 2) {
    double* const merged = sorted == ranked ? other : ranked;
    RSL_RETURN_IF_ERROR(launch_dependent(ranking_merge_kernel, resident_grid(ceil_div(capacity, kThreads), limits), kThreads, 0,
                                         stream, Records{sorted, capacity}, counts, width, merged));
    sorted = merged;
  }
  return cudaSuccess;
}

cudaError_t launch_segment_offsets(const double* segment_of, const double* logit, const int64_t* counts, int64_t capacity,
                                   SegmentTable segments, cudaStream_t stream) {
  DeviceLimits limits;
  RSL_RETURN_IF_ERROR(device_limits(&limits));
  const int64_t grid = resident_grid(ceil_div(static_cast<int64_t>(segments.count) + 1, kThreads), limits);
  return launch_dependent(ranking_offsets_kernel, grid, kThreads, 0, stream, segment_of, logit, counts, capacity, segments);
}

template <class T>
cudaError_t launch_breakpoints(const double* ranked, const int64_t* counts, int64_t capacity, double delta,
                               Breakpoints<T> breakpoints, cudaStream_t stream) {
  const bool is_segmented = breakpoints.segments.count > 1;
  if (is_segmented) {
    RSL_RETURN_IF_ERROR(launch_segment_offsets(ranked + kSegment * capacity, ranked + kLogit * capacity, counts, capacity,
                                               breakpoints.segments, stream));
  }
  const auto kernel = is_segmented ? ranking_breakpoints_kernel<T, true> : ranking_breakpoints_kernel<T, false>;
  // A thread per positive of the capacity; without any, the table of segments is written all the same.
  const int64_t grid = std::max<int64_t>(1, ceil_div(capacity, kThreads));
  return launch_dependent(kernel, grid, kThreads, 0, stream, ranked, counts, capacity, delta, breakpoints);
}

template cudaError_t launch_breakpoints<float>(const double*, const int64_t*, int64_t, double, Breakpoints<float>,
                                               cudaStream_t);
template cudaError_t launch_breakpoints<double>(const double*, const int64_t*, int64_t, double, Breakpoints<double>,
                                                cudaStream_t);

}  // namespace rsloss
