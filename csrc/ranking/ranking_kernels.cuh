// Launchers of the ranking sweep on a GPU. Pointers, sizes, a stream; no torch, no allocation, no synchronisation: every launch
// is sized by shapes on the host, loops are bounded by counts on the device. Layouts: rsloss_kernels/losses/ranking/README.md.
//   ranking_collect_kernels.cu   the records of the positives, the mask of the negatives
//   ranking_rank_kernels.cu      sorts the records; their breakpoints, and where each segment has its own
//   ranking_bin_kernels.cu       streams the logits into the bins
//   ranking_value_kernels.cu     bins and gradient of many 16-bit logits, value by value
//   ranking_finalize_kernels.cu  what the losses' finalizers share: counts before each slot, means, lines
//   ranking_backward_kernels.cu  streams the logits into their gradient
// The number of launches depends on the number of tensors and on capacities, never on the data. Streaming passes: targets once
// in collect, logits once in bin and once in backward. Capacities are below 2^29: positives and breakpoints are counted in int,
// elements in int64. Each launcher enqueues on `stream` and returns the first error. Bitwise deterministic: integer atomics
// only; sums of doubles run in an order that depends on the number of positives alone, not on the capacity or the device.
#pragma once

#include "common/cuda_launch.h"
#include "ranking/ranking.h"

namespace rsloss {

// The segment of every element of one tensor.
struct SegmentMap {
  const int32_t* ids;  // of rows or columns; null: equal chunks
  bool is_by_column;
  int32_t count;  // num_segments; ids outside [0, count) mean ignored
  int64_t first;  // added to an element's index; with ids the flat index of the tensor's element 0
  int64_t width;  // elements of a row, or of a chunk
};

// One tensor of the logits list with its targets.
struct CollectLevel {
  const void* logits;  // [elements]
  Type logits_type;
  const void* targets;  // dense: floating [elements]; class indices: int32/int64 [elements / shape.classes]
  Type targets_type;
  const void* quality;  // floating [elements / shape.classes], or null
  Type quality_type;
  uint64_t* negatives;  // [ceil(elements / 64)], out
  int64_t elements;
  IndexShape shape;     // read with class indices only
  int64_t first_index;  // flat index of element 0 over the concatenation
  SegmentMap segments;
};

// positives f64 [4, capacity], counts int64 [3], both out. workspace: collect_workspace_bytes(...) bytes.
cudaError_t collect_workspace_bytes(const CollectLevel* levels, int num_levels, int64_t* bytes);
cudaError_t launch_ranking_collect(const CollectLevel* levels, int num_levels, bool background_first, int64_t capacity,
                                   double* positives, int64_t* counts, void* workspace, cudaStream_t stream);

// Where the valid positives of each segment stand among the ranked ones. Their breakpoints have twice these places.
struct SegmentTable {
  int32_t* offsets;  // [count + 1]; segment g has the ranks [offsets[g], offsets[g + 1]), offsets[count] = V
  int32_t* holders;  // [1], segments that hold a valid positive
  int32_t count;

  static SegmentTable take(Workspace* workspace, int32_t count) {
    SegmentTable result;
    result.offsets = workspace->take<int32_t>(count + 1);
    result.holders = workspace->take<int32_t>(1);
    result.count = count;
    return result;
  }
};

// segment_of f64 [capacity], ascending over the used columns, `logit` NaN (or the segment at least `count`) behind the valid
// ones; logit may be null. -> offsets; *holders = 0.
cudaError_t launch_segment_offsets(const double* segment_of, const double* logit, const int64_t* counts, int64_t capacity,
                                   SegmentTable segments, cudaStream_t stream);

// The merged breakpoints of the valid positives, segment by segment. T: float or double, the arithmetic type of the logits.
template <class T>
struct Breakpoints {
  T* edges;          // [2 capacity], ascending inside a segment; first 2V used
  int32_t* lo_slot;  // [capacity], place of lo_i among the edges
  int32_t* hi_slot;  // [capacity]
  SegmentTable segments;

  static Breakpoints take(Workspace* workspace, int64_t capacity, int32_t num_segments) {
    Breakpoints result;
    result.edges = workspace->take<T>(2 * capacity);
    result.lo_slot = workspace->take<int32_t>(capacity);
    result.hi_slot = workspace->take<int32_t>(capacity);
    result.segments = SegmentTable::take(workspace, num_segments);
    return result;
  }
};

// positives f64 [4, capacity] -> ranked f64 [4, capacity]; clears bins int64 [2, 2 capacity + 1] and histogram [values].
// workspace: rank_workspace_bytes(capacity) bytes.
int64_t rank_workspace_bytes(int64_t capacity);
cudaError_t launch_rank(const double* positives, const int64_t* counts, int64_t capacity, int32_t num_segments, double* ranked,
                        int64_t* bins, uint32_t* histogram, int values, void* workspace, cudaStream_t stream);

// ranked f64 [4, capacity] -> breakpoints and their segments.
template <class T>
cudaError_t launch_breakpoints(const double* ranked, const int64_t* counts, int64_t capacity, double delta,
                               Breakpoints<T> breakpoints, cudaStream_t stream);

struct LogitsLevel {
  const void* logits;        // [elements]
  const uint8_t* negatives;  // [8 ceil(elements / 64)]
  int64_t elements;
  SegmentMap segments;
};

// positives f64 [4, capacity], counts int64 [3] -> ranked f64 [4, capacity], bins int64 [2, 2 capacity + 1].
int64_t bin_workspace_bytes(Type logits_type, int64_t capacity, int32_t num_segments);
cudaError_t launch_ranking_bin(const LogitsLevel* levels, int num_levels, Type logits_type, const double* positives,
                               const int64_t* counts, int64_t capacity, int32_t num_segments, double delta, double* ranked,
                               int64_t* bins, void* workspace, cudaStream_t stream);

// Arguments of a finalizer. workspace: as many bytes as its own function says.
struct FinalizeArguments {
  Type logits_type;
  const double* ranked;   // [4, capacity]
  const int64_t* counts;  // [3]
  const int64_t* bins;    // [2, 2 capacity + 1]
  int64_t capacity;
  int32_t num_segments;
  double delta;
  double gradient_scale;
  double* gradients;  // [4, capacity], out
  double* lines;      // [3, 2 capacity], out
  void* workspace;
  cudaStream_t stream;
};

struct BackwardLevel {
  const void* logits;        // [elements]
  const uint8_t* negatives;  // [8 ceil(elements / 64)]
  void* gradient;            // [elements], type of the logits, out
  int64_t elements;
  int64_t first_index;
  SegmentMap segments;
};

// gradients f64 [4, capacity], lines f64 [3, 2 capacity], counts int64 [3]; grad_first, grad_second: 0-d in the arithmetic
// type, or null for zero. Writes every element of every gradient. workspace: backward_workspace_bytes(...) bytes.
int64_t backward_workspace_bytes(Type logits_type, int32_t num_segments);
cudaError_t launch_ranking_backward(const BackwardLevel* levels, int num_levels, Type logits_type, const double* gradients,
                                    const double* lines, const int64_t* counts, int64_t capacity, int32_t num_segments,
                                    const void* grad_first, const void* grad_second, void* workspace, cudaStream_t stream);

}  // namespace rsloss
