// Launchers of the Rank & Sort loss on a GPU. Pointers, sizes, a stream; no torch, no allocation, no synchronisation.
// Layouts: rsloss_kernels/losses/ranking/README.md.
#pragma once

#include "common/cuda_launch.h"

namespace rsloss {

// ranked f64 [4, capacity], counts int64 [2], bins int64 [2, 2 capacity + 1] -> ranking, sorting: 0-d, double for double
// logits, else float; gradients f64 [3, capacity]; lines f64 [3, 2 capacity]. elements: of all logits, which sets the unit of
// the bins' sums. workspace: rank_sort_workspace_bytes(...) bytes.
int64_t rank_sort_workspace_bytes(Type logits_type, int64_t capacity);
cudaError_t launch_rank_sort_finalize(Type logits_type, const double* ranked, const int64_t* counts, const int64_t* bins,
                                      int64_t elements, int64_t capacity, double delta, double gradient_scale, void* ranking,
                                      void* sorting, double* gradients, double* lines, void* workspace, cudaStream_t stream);

}  // namespace rsloss
