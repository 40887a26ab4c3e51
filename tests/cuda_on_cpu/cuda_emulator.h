// Stands in for the CUDA headers so that g++ compiles the unchanged .cu files, and runs their kernels on the CPU.
//
// Every CUDA thread of a block is a fiber; fibers switch at barriers and warp intrinsics only, blocks run one after another,
// all on the calling thread. Barriers that not all threads of a block reach, and warp intrinsics that not the whole warp
// reaches, throw instead of hanging. Shared memory is poisoned before every block. Not modelled: concurrency of blocks, memory
// ordering, time. Environment:
//   RSL_EMULATOR_REVERSE=1      runs blocks, warps and lanes in the opposite order: a value of another thread that is read
//                               without a barrier is missing in one of the two orders
//   RSL_EMULATOR_PROCESSORS     what the device reports, default 2
//   RSL_EMULATOR_SHARED_BYTES   per block, default 99 KiB
#pragma once

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
#include <stdexcept>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define RSL_DYNAMIC_SHARED(name) unsigned char* const name = cuda_emulator::block().dynamic_shared.get()

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
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// Set for the fiber that runs.
inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;

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
      *value = 1024;
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

// ---- fibers
// ----------------------------------------------------------------------------------------------------------------------

namespace cuda_emulator {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class State : uint8_t { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  jmp_buf context;
  std::unique_ptr<char[]> stack;
  State state = State::kDone;
  bool is_alive = false;  // has a context that can be resumed
  uint3 thread = {0, 0, 0};
};

struct Warp {
  uint64_t deposit[kWarpSize];
  // Copied when all lanes have arrived. It lasts until they arrive at the next exchange, so every lane has read it by then.
  uint64_t result[kWarpSize];
  unsigned arrived = 0;
  unsigned running = 0;
};

// The block that runs on this OS thread.
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
};

inline Block& block() {
  static thread_local Block instance;
  return instance;
}

inline void switch_away(State state) {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  fiber.state = state;
  if (_setjmp(fiber.context) == 0) _longjmp(b.scheduler, 1);
}

// A fiber outlives the kernel and is used again by the next one: starting a context costs system calls.
inline void fiber_main() {
  for (;;) {
    try {
      (*block().kernel)();
    } catch (...) {
      block().failure = std::current_exception();
    }
    switch_away(State::kDone);
  }
}

inline void resume(int index) {
  Block& b = block();
  b.current = index;
  Fiber& fiber = b.fibers[index];
  threadIdx = fiber.thread;
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.is_alive) _longjmp(fiber.context, 1);
  fiber.is_alive = true;
  getcontext(&b.starter);
  b.starter.uc_stack.ss_sp = fiber.stack.get();
  b.starter.uc_stack.ss_size = kStackBytes;
  b.starter.uc_link = nullptr;
  makecontext(&b.starter, fiber_main, 0);
  setcontext(&b.starter);
}

// Stacks of fibers that stopped half-way are given up, with what they own.
inline void abandon(Block& b) {
  for (int i = 0; i < b.threads; ++i) {
    if (b.fibers[i].state != State::kDone) b.fibers[i].is_alive = false;
    b.fibers[i].state = State::kDone;
  }
}

// Runs the lanes of one warp until every one of them waits for the block or is done. Returns how many got done.
inline int run_warp(int first, bool reverse) {
  Block& b = block();
  int done = 0;
  for (bool has_run = true; has_run;) {
    has_run = false;
    for (int k = 0; k < kWarpSize; ++k) {
      const int i = first + (reverse ? kWarpSize - 1 - k : k);
      if (i >= b.threads || b.fibers[i].state != State::kReady) continue;
      resume(i);
      has_run = true;
      if (b.failure) {
        abandon(b);
        std::rethrow_exception(std::exchange(b.failure, nullptr));
      }
      if (b.fibers[i].state == State::kDone) {
        ++done;
        b.warps[i / kWarpSize].running &= ~(1u << (i % kWarpSize));
      }
    }
  }
  return done;
}

inline void run_block(bool reverse) {
  Block& b = block();
  const int threads = b.threads;
  const int warps = static_cast<int>(b.warps.size());
  for (Warp& warp : b.warps) warp.arrived = warp.running = 0;
  for (int i = 0; i < threads; ++i) {
    b.fibers[i].state = State::kReady;
    b.warps[i / kWarpSize].running |= 1u << (i % kWarpSize);
  }
  int done = 0;
  while (done < threads) {
    for (int w = 0; w < warps; ++w) done += run_warp((reverse ? warps - 1 - w : w) * kWarpSize, reverse);
    int waiting = 0;
    for (int i = 0; i < threads; ++i) waiting += b.fibers[i].state == State::kAtBlockBarrier;
    // Unlike the hardware, which counts exited threads as arrived, this takes a barrier that some threads skipped for a
    // mistake.
    if (done != threads && waiting != threads) {
      abandon(b);
      throw std::runtime_error("cuda_emulator: threads of a block wait at different barriers, or some left before one");
    }
    for (int i = 0; i < threads; ++i) {
      if (b.fibers[i].state == State::kAtBlockBarrier) b.fibers[i].state = State::kReady;
    }
  }
}

inline void run_grid(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& kernel) {
  Block& b = block();
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
  for (unsigned k = 0; k < blocks; ++k) {
    const unsigned i = reverse ? blocks - 1 - k : k;
    std::memset(b.dynamic_shared.get(), 0xcd, shared_bytes);
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(reverse);
  }
}

// Every lane deposits a value; when the last one arrives, all may read. Returns the values as raw words. Masks must be full.
template <class T>
const uint64_t* exchange(unsigned mask, T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  constexpr unsigned kAll = ~0u;
  Block& b = block();
  const int lane = b.current % kWarpSize;
  Warp& warp = b.warps[b.current / kWarpSize];
  if (mask != kAll) throw std::runtime_error("cuda_emulator: a warp intrinsic with a mask of less than the whole warp");
  if (warp.running != kAll) throw std::runtime_error("cuda_emulator: a warp intrinsic names lanes that have left the kernel");
  std::memcpy(&warp.deposit[lane], &value, sizeof(T));
  warp.arrived |= 1u << lane;
  if (warp.arrived != kAll) {
    switch_away(State::kAtWarpBarrier);
    return warp.result;
  }
  warp.arrived = 0;
  std::memcpy(warp.result, warp.deposit, sizeof(warp.result));
  for (int other = 0; other < kWarpSize; ++other) b.fibers[b.current - lane + other].state = State::kReady;
  return warp.result;
}

template <class T>
T read(const uint64_t* words, int lane) {
  T value;
  std::memcpy(&value, &words[lane], sizeof(T));
  return value;
}

inline int lane() { return block().current % kWarpSize; }

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
  ++cuda_emulator::launches;
  cuda_emulator::run_grid(grid, shape, config->dynamicSmemBytes, [=] { kernel(arguments...); });
  return cudaSuccess;
}

// ---- what kernels use
// ------------------------------------------------------------------------------------------------------------

using std::isfinite;
using std::isinf;
using std::isnan;

inline void __syncthreads() { cuda_emulator::switch_away(cuda_emulator::State::kAtBlockBarrier); }

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
