// How ranking kernels are launched where more than one way is right: each gives the same bits, and which one is faster is for a
// GPU to say. The defaults are what everybody gets; bench/gpu_variants.py changes them through rsloss_set_launch_options, for
// the process, and measures. Host only.
#pragma once

namespace rsloss {

struct LaunchOptions {
  // Compute capability 9.0 and newer: a kernel is started while the one before it ends (programmatic dependent launch), and
  // waits for its results by itself. Saves the time between small kernels.
  bool is_programmatic = false;
  // Blocks of the passes over the logits that share a processor: 1 of 1024 threads, or 2 of 768, which hide more latency, where
  // the registers allow them, with half the shared memory each.
  int blocks_per_processor = 1;
  // Most copies of the bins in shared memory: more keep lanes of a warp that meet in one bin apart, fewer are set up and added
  // up sooner.
  int most_replicas = 32;
};

inline LaunchOptions launch_options;

}  // namespace rsloss

// False, and nothing changed, if a number is out of range.
extern "C" __attribute__((visibility("default"))) bool rsloss_set_launch_options(bool is_programmatic, int blocks_per_processor,
                                                                                 int most_replicas);
