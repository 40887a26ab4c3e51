// Launchers of the AP loss on a GPU. Pointers, sizes, a stream; no torch, no allocation, no synchronisation.
// Layouts: rsloss_kernels/losses/ranking/README.md.
#pragma once

#include "ranking/ranking_kernels.cuh"

namespace rsloss {

// loss: 0-d, double for double logits, else float; out.
int64_t average_precision_workspace_bytes(Type logits_type, int64_t capacity, int32_t num_segments);
cudaError_t launch_average_precision_finalize(const FinalizeArguments& arguments, bool interpolated, void* loss);

}  // namespace rsloss
