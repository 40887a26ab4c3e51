// Launchers of the element-wise sigmoid losses on a GPU. Pointers, sizes, a stream; no torch, no allocation, no
// synchronisation. Layouts: rsloss_kernels/losses/focal/README.md.
//   forward    one pass over all levels into sums of the blocks, which a second launch adds up
//   elements   one pass over all levels
//   backward   one pass over all levels
// More than kMostFocalLevels levels take a launch for each so many.
#pragma once

#include "common/cuda_launch.h"
#include "focal/focal.h"

namespace rsloss {

constexpr int kMostFocalLevels = 16;

// One tensor of the logits list with what belongs to it; [outer, classes, inner].
struct FocalDeviceLevel {
  const void* logits;
  const void* targets;  // floating [outer, classes, inner], or labels [outer, inner]
  Type targets_type;
  const void* qualities;  // floating [outer, inner], or null
  Type qualities_type;
  const void* weights;  // floating [outer, classes, inner] or [outer, inner]; null: 1
  Type weights_type;
  bool weights_by_row;
  const void* grads;  // floating [outer, classes, inner]; null: one for all, see FocalProblem
  Type grads_type;
  void* outputs;  // losses or gradients, type of the logits
  int64_t outer;
  int64_t inner;
};

struct FocalProblem {
  const FocalDeviceLevel* levels;
  int num_levels;
  Type logits_type;
  int64_t classes;
  const double* class_table;  // [3, classes]
  FocalModulator modulator;
  LabelRule labels;
  const void* normalizer;  // 0-d, or null: 1
  Type normalizer_type;
  const void* grad;  // 0-d, or null: 1
  Type grad_type;
  double scale;
};

// loss: 0-d, double for double logits, else float; class_sums f64 [2, classes], or null; both out.
// workspace: focal_forward_workspace_bytes(...) bytes.
cudaError_t focal_forward_workspace_bytes(const FocalProblem& problem, bool class_sums, int64_t* bytes);
cudaError_t launch_focal_forward(const FocalProblem& problem, void* loss, double* class_sums, void* workspace,
                                 cudaStream_t stream);

// Writes the losses of all elements.
cudaError_t launch_focal_elements(const FocalProblem& problem, cudaStream_t stream);

// Writes the gradients of all elements.
cudaError_t launch_focal_backward(const FocalProblem& problem, cudaStream_t stream);

}  // namespace rsloss
