// Launchers of the aLRP loss on a GPU. Pointers, sizes, a stream; no torch, no allocation, no synchronisation.
// Layouts: rsloss_kernels/losses/ranking/README.md.
#pragma once

#include "ranking/ranking_kernels.cuh"

namespace rsloss {

// classification: 0-d, double for double logits, else float; rank f64 [capacity]; both out.
int64_t alrp_workspace_bytes(Type logits_type, int64_t capacity, int32_t num_segments);
cudaError_t launch_alrp_finalize(const FinalizeArguments& arguments, void* classification, double* rank);

}  // namespace rsloss
