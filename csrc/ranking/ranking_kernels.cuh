// Launchers of the ranking sweep on a GPU. Pointers, sizes, a stream; no torch, no allocation, no synchronisation: every launch
// is sized by shapes on the host, loops are bounded by counts on the device. Layouts: rsloss_kernels/losses/ranking/README.md.
// Capacities are below 2^29: positives and breakpoints are counted in int, elements in int64.
// Each launcher enqueues on `stream` and returns the first error. Bitwise deterministic: integer atomics only.
#pragma once

#include "common/cuda_launch.h"

namespace rsloss {

// One tensor of the logits list with its targets.
struct CollectLevel {
  const void* logits;  // [elements]
  Type logits_type;
  const void* targets;  // dense: floating [elements]; class indices: int32/int64 [elements / classes]
  Type targets_type;
  const void* quality;  // floating [elements / classes], or null
  Type quality_type;
  uint64_t* negatives;  // [ceil(elements / 64)], out
  int64_t elements;
  int64_t classes;      // read with class indices only
  int64_t first_index;  // flat index of element 0 over the concatenation
};

// positives f64 [4, capacity], counts int64 [2], both out. workspace: collect_workspace_bytes(...) bytes.
cudaError_t collect_workspace_bytes(const CollectLevel* levels, int num_levels, int64_t* bytes);
cudaError_t launch_ranking_collect(const CollectLevel* levels, int num_levels, bool background_first, int64_t capacity,
                                   double* positives, int64_t* counts, void* workspace, cudaStream_t stream);

struct LogitsLevel {
  const void* logits;        // [elements]
  const uint8_t* negatives;  // [8 ceil(elements / 64)]
  int64_t elements;
};

// positives f64 [4, capacity], counts int64 [2] -> ranked f64 [4, capacity], bins int64 [2, 2 capacity + 1].
int64_t bin_workspace_bytes(Type logits_type, int64_t capacity);
cudaError_t launch_ranking_bin(const LogitsLevel* levels, int num_levels, Type logits_type, const double* positives,
                               const int64_t* counts, int64_t capacity, double delta, double* ranked, int64_t* bins,
                               void* workspace, cudaStream_t stream);

// The merged breakpoints of the valid positives. T: float or double, the arithmetic type of the logits.
template <class T>
struct Breakpoints {
  T* edges;          // [2 capacity], ascending; first 2V used
  int32_t* lo_slot;  // [capacity], place of lo_i among the edges
  int32_t* hi_slot;  // [capacity]

  static Breakpoints take(Workspace* workspace, int64_t capacity) {
    Breakpoints result;
    result.edges = workspace->take<T>(2 * capacity);
    result.lo_slot = workspace->take<int32_t>(capacity);
    result.hi_slot = workspace->take<int32_t>(capacity);
    return result;
  }
};

// ranked f64 [4, capacity] -> breakpoints.
template <class T>
cudaError_t launch_breakpoints(const double* ranked, const int64_t* counts, int64_t capacity, double delta,
                               Breakpoints<T> breakpoints, cudaStream_t stream);

// bins int64 [2, 2 capacity + 1] -> from_slot int64 [2 capacity + 1]: negatives at or right of every edge; entry 2V is 0.
cudaError_t launch_count_from_slot(const double* ranked, const int64_t* counts, const int64_t* bins, int64_t capacity,
                                   int64_t* from_slot, cudaStream_t stream);

struct BackwardLevel {
  const void* logits;        // [elements]
  const uint8_t* negatives;  // [8 ceil(elements / 64)]
  void* gradient;            // [elements], type of the logits, out
  int64_t elements;
  int64_t first_index;
};

// gradients f64 [3, capacity], lines f64 [3, 2 capacity], counts int64 [2]; grad_first, grad_second: 0-d in the arithmetic
// type, or null for zero. Writes every element of every gradient.
cudaError_t launch_ranking_backward(const BackwardLevel* levels, int num_levels, Type logits_type, const double* gradients,
                                    const double* lines, const int64_t* counts, int64_t capacity, const void* grad_first,
                                    const void* grad_second, cudaStream_t stream);

}  // namespace rsloss
