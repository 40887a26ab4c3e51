// Launchers of gradient harmonizing on a GPU. Pointers, sizes, a stream; no torch, no allocation, no synchronisation. Layouts:
// rsloss_kernels/losses/ghm/README.md.
//   histogram  one pass over each level into tables of the blocks, which a last launch adds up
//   finalize   the bins, by one block
//   backward   one pass over each level
// One launch per level that is not empty, and one to add up. Sums of doubles run in an order that the sizes and the device fix.
#pragma once

#include "common/cuda_launch.h"
#include "ghm/ghm.h"

namespace rsloss {

// One tensor of the preds list with what belongs to it.
struct GhmDeviceLevel {
  const void* preds;    // [elements]
  const void* targets;  // dense: floating [elements]; class indices: int32/int64 [elements / shape.classes]
  Type targets_type;
  const void* weights;  // floating [elements], or [elements / shape.classes]; null: every element is valid
  Type weights_type;
  bool weights_by_row;
  int64_t elements;
  IndexShape shape;  // read with class indices and weights by row only
  void* gradients;   // [elements], type of preds; out, of backward only
};

struct GhmProblem {
  const GhmDeviceLevel* levels;
  int num_levels;
  Type preds_type;
  int bins;
  double mu;  // 0: GHM-C
  bool background_first;
};

// histogram f64 [2, bins + 1], out. workspace: ghm_histogram_workspace_bytes(...) bytes.
cudaError_t ghm_histogram_workspace_bytes(const GhmProblem& problem, int64_t* bytes);
cudaError_t launch_ghm_histogram(const GhmProblem& problem, double* histogram, void* workspace, cudaStream_t stream);

struct GhmFinalizeArguments {
  const double* histogram;     // [2, bins + 1]
  const void* acc_sum;         // state_type [bins], or null
  const int64_t* num_updates;  // [bins], or null
  Type state_type;
  Type loss_type;
  int bins;
  double momentum;
  bool count_empty_bins;
  double gradient_scale;
  void* loss;                // 0-d, out
  void* new_acc_sum;         // state_type [bins], out
  int64_t* new_num_updates;  // [bins], out; read only with num_updates
  double* bin_weights;       // [bins], out
};
cudaError_t launch_ghm_finalize(const GhmFinalizeArguments& arguments, cudaStream_t stream);

// bin_weights f64 [bins]; grad_loss: 0-d. Writes every element of every gradient.
cudaError_t launch_ghm_backward(const GhmProblem& problem, const double* bin_weights, const void* grad_loss,
                                Type grad_loss_type, cudaStream_t stream);

}  // namespace rsloss
