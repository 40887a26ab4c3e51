// Kernels with planted mistakes, to see that the emulator shows them. Each function returns 0, or 1 with the message in `text`.
#include <cstring>

#include "common/cuda_device.cuh"

namespace {

using namespace rsloss;

__global__ void reverse_kernel(const int* in, int* out, bool has_barrier) {
  __shared__ int shared[64];
  shared[threadIdx.x] = in[threadIdx.x];
  if (has_barrier) __syncthreads();
  out[threadIdx.x] = shared[63 - threadIdx.x];
  // Clears the way for the next run: what a block leaves in shared memory is not to be seen there.
  __syncthreads();
  shared[threadIdx.x] = -1;
}

__global__ void divergent_barrier_kernel(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_warp_kernel(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = warp_sum(1);
}

__global__ void divergent_syncwarp_kernel(int* out) {
  if (threadIdx.x % 32 < 31) __syncwarp();
  out[threadIdx.x] = 1;
}

__global__ void impatient_kernel(int* out) {
  if (threadIdx.x > 0) wait_for_previous_kernel();
  out[threadIdx.x] = 1;
}

// A table of one bin too few.
__global__ void past_the_table_kernel(int* out, int count) {
  RSL_DYNAMIC_SHARED(shared);
  int* const table = reinterpret_cast<int*>(shared);
  table[threadIdx.x % (count + 1)] = 1;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < count) out[threadIdx.x] = table[threadIdx.x];
}

__global__ void past_the_end_kernel(int* out, int count) {
  if (static_cast<int>(threadIdx.x) <= count) out[threadIdx.x] = 1;
}

template <class Run>
int report(Run run, char* text) {
  try {
    const cudaError_t error = run();
    std::strcpy(text, error == cudaSuccess ? "" : "launch failed");
    return error != cudaSuccess;
  } catch (const std::exception& error) {
    std::strncpy(text, error.what(), 200);
    return 1;
  }
}

}  // namespace

extern "C" {
int reverse(const int* in, int* out, bool has_barrier, char* text) {
  return report([=] { return launch(reverse_kernel, 1, 64, 0, nullptr, in, out, has_barrier); }, text);
}
int divergent_barrier(int* out, char* text) {
  return report([=] { return launch(divergent_barrier_kernel, 1, 64, 0, nullptr, out); }, text);
}
int divergent_warp(int* out, char* text) {
  return report([=] { return launch(divergent_warp_kernel, 1, 64, 0, nullptr, out); }, text);
}
int divergent_syncwarp(int* out, char* text) {
  return report([=] { return launch(divergent_syncwarp_kernel, 1, 64, 0, nullptr, out); }, text);
}
int impatient(int* out, char* text) {
  launch_options.is_programmatic = true;
  return report([=] { return launch_dependent(impatient_kernel, 1, 64, 0, nullptr, out); }, text);
}
int past_the_table(int* out, int count, char* text) {
  return report([=] { return launch(past_the_table_kernel, 1, 64, count * sizeof(int), nullptr, out, count); }, text);
}
int past_the_end(int* out, int count, char* text) {
  return report([=] { return launch(past_the_end_kernel, 1, 64, 0, nullptr, out, count); }, text);
}
int too_many_threads(int* out, char* text) {
  return report([=] { return launch(divergent_barrier_kernel, 1, 2048, 0, nullptr, out); }, text);
}
}
