// Launchers of smooth L1 loss on a GPU. Pointers, sizes, a stream; no torch, no allocation, no synchronisation. Layouts:
// rsloss_kernels/losses/smooth_l1/README.md.
//   forward    one launch for few elements, else one over all and one to add up
//   elements, backward   one launch
// What is launched depends on the size alone. Sums run in an order that the size and the device fix.
#pragma once

#include "common/cuda_launch.h"
#include "smooth_l1/smooth_l1.h"

namespace rsloss {

struct SmoothL1DeviceProblem {
  const void* pred;  // [elements]
  Type pred_type;
  const void* target;  // [elements]
  Type target_type;
  const void* weight;  // [elements / row], or null: all are 1
  Type weight_type;
  int64_t row;       // elements that share a weight
  const void* beta;  // 0-d, or null: fixed_beta
  Type beta_type;
  double fixed_beta;
  const void* normalizer;  // 0-d, or null: 1
  Type normalizer_type;
  double scale;
  int64_t elements;
};

// loss: 0-d of loss_type, out. workspace: smooth_l1_workspace_bytes(...) bytes.
cudaError_t smooth_l1_workspace_bytes(const SmoothL1DeviceProblem& problem, int64_t* bytes);
cudaError_t launch_smooth_l1_forward(const SmoothL1DeviceProblem& problem, Type loss_type, void* loss, void* workspace,
                                     cudaStream_t stream);

// losses: type of pred [elements], out.
cudaError_t launch_smooth_l1_elements(const SmoothL1DeviceProblem& problem, void* losses, cudaStream_t stream);

// grad: [elements], or 0-d. gradient: type of pred [elements], out.
cudaError_t launch_smooth_l1_backward(const SmoothL1DeviceProblem& problem, const void* grad, Type grad_type,
                                      bool grad_is_of_loss, void* gradient, cudaStream_t stream);

}  // namespace rsloss
