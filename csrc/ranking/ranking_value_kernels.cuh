// Many 16-bit logits of one segment: at most 65,536 values, so that counting them and looking them up replaces the search for
// the edge of every element.
#pragma once

#include "ranking/ranking_kernels.cuh"

namespace rsloss {

constexpr int kValues = 1 << 16;

// Below this the tables of values cost more than the searches. Counters have 32 bits. The bins are the same bit for bit on both
// paths, so that processes of a group need not agree on one.
constexpr int64_t kFewestByValue = int64_t{1} << 20;

inline bool is_by_value(int64_t elements, int32_t num_segments) {
  return num_segments == 1 && elements >= kFewestByValue && elements < (int64_t{1} << 32);
}

template <class Level>
int64_t count_elements(const Level* levels, int num_levels) {
  int64_t elements = 0;
  for (int i = 0; i < num_levels; ++i) elements += levels[i].elements;
  return elements;
}

// Element: __half or __nv_bfloat16. Adds the negatives to `bins`, which are 0 as is `histogram` [kValues].
template <class Element>
cudaError_t launch_value_bin(const LogitsLevel* levels, int num_levels, const int64_t* counts, int64_t capacity,
                             Breakpoints<float> breakpoints, double widest, int64_t* bins, uint32_t* histogram,
                             cudaStream_t stream);

// Writes the gradient of every element but the positives; table [kValues] is temporary.
template <class Element>
cudaError_t launch_value_backward(const BackwardLevel* levels, int num_levels, const double* lines, const int64_t* counts,
                                  int64_t capacity, const float* upstream, Element* table, cudaStream_t stream);

}  // namespace rsloss
