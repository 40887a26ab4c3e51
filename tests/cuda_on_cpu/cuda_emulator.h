// Stands in for the CUDA headers so that g++ compiles the unchanged .cu files, and runs their kernels on the CPU.
//
// Every CUDA thread of a block is a fiber; fibers switch at barriers and warp intrinsics only, blocks run one after another,
// all on the calling thread, one launch at a time. Barriers that not all threads of a block reach, and warp intrinsics that not
// the whole warp reaches, throw instead of hanging. Shared memory is poisoned before every block. Not modelled: concurrency of
// blocks, memory ordering, time. Environment:
//   RSL_EMULATOR_REVERSE=1      runs blocks, warps and lanes in the opposite order: a value of another thread that is read
//                               without a barrier is missing in one of the two orders
//   RSL_EMULATOR_PROCESSORS     what the device reports, default 2
//   RSL_EMULATOR_SHARED_BYTES   per block, default 99 KiB
//   RSL_EMULATOR_LAST_BLOCKS    of grids of more than 4096 blocks only so many of the last ones run: ends of huge tensors
#pragma once

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define RSL_DYNAMIC_SHARED(name) unsigned char* const name = cuda_emulator::block.dynamic_shared.get()

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- the runtime API that the launchers use
// --------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor
};
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// Set for the fiber that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_emulator {
inline int environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}
}  // namespace cuda_emulator

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int shared = cuda_emulator::environment("RSL_EMULATOR_SHARED_BYTES", 99 * 1024);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = cuda_emulator::environment("RSL_EMULATOR_PROCESSORS", 2);
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = shared;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = shared + 1024;
      break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
// As if no kernel were short of registers.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads, size_t shared_bytes) {
  int shared, most_threads;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0);
  cudaDeviceGetAttribute(&most_threads, cudaDevAttrMaxThreadsPerMultiProcessor, 0);
  *blocks = std::min(most_threads / threads, static_cast<int>(shared / (shared_bytes + 1024)));
  return cudaSuccess;
}

// ---- fibers
// ----------------------------------------------------------------------------------------------------------------------

namespace cuda_emulator {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = ~0u;
constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  bool is_alive = false;  // has a context that can be resumed
  uint3 thread = {0, 0, 0};
};

// Sets of lanes are masks. A lane that is neither ready nor at a barrier of the block waits for its warp, or has left.
struct Warp {
  uint64_t deposit[kWarpSize];
  // Copied when all lanes have arrived. It lasts until they arrive at the next exchange, so every lane has read it by then.
  uint64_t result[kWarpSize];
  unsigned arrived = 0;
  unsigned running = 0;
  unsigned ready = 0;
  unsigned at_block_barrier = 0;
};

// The block that runs.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> dynamic_shared;
  size_t dynamic_bytes = 0;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr failure;
  jmp_buf scheduler;
  ucontext_t starter;
  int current = -1;
  int threads = 0;

  int64_t waits = 0;  // threads of all blocks that waited for the kernel before this one

  Warp& warp() { return warps[current / kWarpSize]; }
  unsigned lane() const { return static_cast<unsigned>(current) % kWarpSize; }
};
inline Block block;
inline std::mutex one_launch;

// Without the interceptor of a sanitizer, which takes a jump to another stack for the end of the frames on this one.
using Jump = void (*)(jmp_buf, int);
inline const Jump jump = reinterpret_cast<Jump>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));

// To the scheduler, and back when it resumes this fiber.
inline void switch_away() {
  block.warp().ready &= ~(1u << block.lane());
  if (_setjmp(block.fibers[block.current].context) == 0) jump(block.scheduler, 1);
}

// A fiber outlives the kernel and is used again by the next one: starting a context costs system calls.
inline void fiber_main() {
  for (;;) {
    try {
      (*block.kernel)();
    } catch (...) {
      block.failure = std::current_exception();
    }
    block.warp().running &= ~(1u << block.lane());
    switch_away();
  }
}

inline void resume(int index) {
  block.current = index;
  Fiber& fiber = block.fibers[index];
  threadIdx = fiber.thread;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.is_alive) jump(fiber.context, 1);
  fiber.is_alive = true;
  getcontext(&block.starter);
  block.starter.uc_stack.ss_sp = fiber.stack.get();
  block.starter.uc_stack.ss_size = kStackBytes;
  block.starter.uc_link = nullptr;
  makecontext(&block.starter, fiber_main, 0);
  setcontext(&block.starter);
}

// Stacks of fibers that stopped half-way are given up, with what they own.
inline void abandon() {
  for (int i = 0; i < block.threads; ++i) {
    if ((block.warps[i / kWarpSize].running >> (i % kWarpSize) & 1u) != 0) block.fibers[i].is_alive = false;
  }
}

// Runs the lanes of one warp in turn until every one of them waits for the block or is done.
inline void run_warp(int index, bool reverse) {
  Warp& warp = block.warps[index];
  while (warp.ready != 0) {
    // Lanes that this turn has still to come to.
    unsigned left = kAllLanes;
    while ((warp.ready & left) != 0) {
      const int lane = reverse ? kWarpSize - 1 - __builtin_clz(warp.ready & left) : __builtin_ctz(warp.ready & left);
      left = reverse ? (1u << lane) - 1 : ~1u << lane;
      resume(index * kWarpSize + lane);
      if (block.failure) {
        abandon();
        std::rethrow_exception(std::exchange(block.failure, nullptr));
      }
    }
  }
}

inline void run_block(bool reverse) {
  const int warps = static_cast<int>(block.warps.size());
  for (int w = 0; w < warps; ++w) {
    Warp& warp = block.warps[w];
    const int lanes = std::min(kWarpSize, block.threads - w * kWarpSize);
    warp.arrived = warp.at_block_barrier = 0;
    warp.ready = warp.running = kAllLanes >> (kWarpSize - lanes);
  }
  for (;;) {
    for (int w = 0; w < warps; ++w) run_warp(reverse ? warps - 1 - w : w, reverse);
    int running = 0;
    int waiting = 0;
    for (Warp& warp : block.warps) {
      running += __builtin_popcount(warp.running);
      waiting += __builtin_popcount(warp.at_block_barrier);
      warp.ready = std::exchange(warp.at_block_barrier, 0);
    }
    if (running == 0) return;
    // Unlike the hardware, which counts exited threads as arrived, this takes a barrier that some threads skipped for a
    // mistake.
    if (waiting != block.threads) {
      abandon();
      throw std::runtime_error("cuda_emulator: threads of a block wait at different barriers, or some left before one");
    }
  }
}

inline void run_grid(dim3 grid, dim3 shape, size_t shared_bytes, bool may_start_early, const std::function<void()>& kernel) {
  Block& b = block;
  b.waits = 0;
  const int threads = static_cast<int>(shape.x * shape.y * shape.z);
  if (static_cast<int>(b.fibers.size()) < threads) b.fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    const unsigned u = static_cast<unsigned>(i);
    fiber.thread = {u % shape.x, u / shape.x % shape.y, u / (shape.x * shape.y)};
  }
  b.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  b.kernel = &kernel;
  b.threads = threads;
  blockDim = shape;
  gridDim = grid;
  const bool reverse = environment("RSL_EMULATOR_REVERSE", 0) != 0;
  // As long as asked for and no longer, so that a sanitizer sees where it ends.
  if (b.dynamic_bytes != shared_bytes || !b.dynamic_shared) b.dynamic_shared.reset(new unsigned char[shared_bytes]);
  b.dynamic_bytes = shared_bytes;
  const unsigned blocks = grid.x * grid.y * grid.z;
  const unsigned last = static_cast<unsigned>(environment("RSL_EMULATOR_LAST_BLOCKS", 0));
  const unsigned left_out = last > 0 && blocks > 4096 ? blocks - last : 0;
  for (unsigned k = 0; k < blocks - left_out; ++k) {
    const unsigned i = reverse ? blocks - 1 - k : k + left_out;
    std::memset(b.dynamic_shared.get(), 0xcd, shared_bytes);
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(reverse);
  }
  if (may_start_early && b.waits != static_cast<int64_t>(blocks - left_out) * threads) {
    throw std::runtime_error("cuda_emulator: threads of a kernel that may start early do not wait for the one before it");
  }
}

// Every lane deposits a value; when the last one arrives, all may read. Returns the values as raw words. Masks must be full.
template <class T>
const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = block.warp();
  if (mask != kAllLanes) throw std::runtime_error("cuda_emulator: a warp intrinsic with a mask of less than the whole warp");
  if (warp.running != kAllLanes)
    throw std::runtime_error("cuda_emulator: a warp intrinsic names lanes that have left the kernel");
  std::memcpy(&warp.deposit[block.lane()], &value, sizeof(T));
  warp.arrived |= 1u << block.lane();
  if (warp.arrived != kAllLanes) {
    switch_away();
    return warp.result;
  }
  warp.arrived = 0;
  std::memcpy(warp.result, warp.deposit, sizeof(warp.result));
  warp.ready = kAllLanes;
  return warp.result;
}

template <class T>
T read(const uint64_t* words, int lane) {
  T value;
  std::memcpy(&value, &words[lane], sizeof(T));
  return value;
}

inline int lane() { return static_cast<int>(block.lane()); }

inline void block_barrier() {
  block.warp().at_block_barrier |= 1u << block.lane();
  switch_away();
}

}  // namespace cuda_emulator

namespace cuda_emulator {
inline int64_t launches = 0;
}
// Launches since the library was loaded; tests call it by name.
extern "C" __attribute__((used)) inline int64_t cuda_emulator_launches() { return cuda_emulator::launches; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const dim3 grid = config->gridDim;
  const dim3 shape = config->blockDim;
  int most_shared;
  cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  const bool is_valid = grid.x > 0 && shape.x * shape.y * shape.z > 0 && shape.x * shape.y * shape.z <= 1024 &&
                        config->dynamicSmemBytes <= static_cast<size_t>(most_shared);
  if (!is_valid) return cudaErrorInvalidConfiguration;
  const std::lock_guard<std::mutex> alone(cuda_emulator::one_launch);
  ++cuda_emulator::launches;
  const bool may_start_early = config->numAttrs > 0 && config->attrs->val.programmaticStreamSerializationAllowed != 0;
  cuda_emulator::run_grid(grid, shape, config->dynamicSmemBytes, may_start_early, [=] { kernel(arguments...); });
  return cudaSuccess;
}

// ---- what kernels use
// ------------------------------------------------------------------------------------------------------------

using std::isfinite;
using std::isinf;
using std::isnan;

inline void cudaTriggerProgrammaticLaunchCompletion() {}
inline void cudaGridDependencySynchronize() { ++cuda_emulator::block.waits; }
inline void __syncthreads() { cuda_emulator::block_barrier(); }

// An exchange of nothing.
inline void __syncwarp() { cuda_emulator::exchange(~0u, 0); }

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* votes = cuda_emulator::exchange(mask, predicate);
  unsigned result = 0;
  for (int i = 0; i < cuda_emulator::kWarpSize; ++i) result |= static_cast<unsigned>(cuda_emulator::read<bool>(votes, i)) << i;
  return result;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_emulator::read<T>(cuda_emulator::exchange(mask, value), cuda_emulator::lane() ^ lane_mask);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const uint64_t* values = cuda_emulator::exchange(mask, value);
  const int source = cuda_emulator::lane() - distance;
  return source >= 0 ? cuda_emulator::read<T>(values, source) : value;
}
// Fibers do not preempt one another.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

// ---- 16-bit floats, rounding to nearest even
// -------------------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof(wide));
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31;
  const int mantissa = x.bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return std::copysign(magnitude, (x.bits & 0x8000) != 0 ? -1.0f : 1.0f);
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  // Half-way between the largest finite value and the next one.
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < std::ldexp(1.0f, -14)) {
    // Subnormal steps of 2^-24; the smallest normal number follows the largest subnormal one.
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24))))};
  }
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(fraction, 11)));
  // A mantissa that rounds up to 2048 carries into the exponent.
  return {static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + mantissa))};
}
