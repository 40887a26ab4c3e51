// Launchers of balanced group softmax on a GPU. Pointers, sizes, a stream; no torch, no allocation, no synchronisation.
// Layouts: rsloss_kernels/losses/group_softmax/README.md.
//   sample     a block per group of classes
//   forward    a warp per row and group, then one launch that adds up
//   backward   a warp per row and group
//   scores     a warp per row
#pragma once

#include "common/cuda_launch.h"
#include "group_softmax/group_softmax.h"

namespace rsloss {

struct GroupLabels {
  const void* labels;  // int32 or int64 [N]
  Type type;
  const int* class_columns;  // [C + 1]
  int64_t rows;
};

// weights: f32 [G, N], out. keys: f32 [G, N], or null.
cudaError_t launch_group_softmax_sample(const GroupLayout& layout, const GroupLabels& labels, const float* keys,
                                        double others_ratio, float* weights, cudaStream_t stream);

// What forward and backward read.
struct GroupRows {
  const void* logits;  // [N, K]
  Type logits_type;
  const void* weights;  // [G, N]
  Type weights_type;
};

// losses: [G], row_tables: [3, G, N], both double for double logits, else float; averages: f64 [G]; all out.
// workspace: group_softmax_workspace_bytes(...) bytes.
cudaError_t group_softmax_workspace_bytes(const GroupLayout& layout, int64_t rows, int64_t* bytes);
cudaError_t launch_group_softmax_forward(const GroupLayout& layout, const GroupLabels& labels, const GroupRows& rows,
                                         void* losses, double* averages, void* row_tables, void* workspace,
                                         cudaStream_t stream);

// grad_losses: [G]. Writes the whole gradient [N, K], type of the logits.
cudaError_t launch_group_softmax_backward(const GroupLayout& layout, const GroupLabels& labels, const GroupRows& rows,
                                          const double* averages, const void* row_tables, const void* grad_losses,
                                          Type grad_losses_type, void* gradient, cudaStream_t stream);

// scores: [N, C + 1], type of the logits.
cudaError_t launch_group_softmax_scores(const GroupLayout& layout, const int* class_columns, const void* logits,
                                        Type logits_type, int64_t rows, void* scores, cudaStream_t stream);

}  // namespace rsloss
