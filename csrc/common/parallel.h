// Threads of the CPU kernels: torch's own pool, so that torch.set_num_threads holds here too.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>
#ifdef RSL_OWN_THREADS
#include <thread>
#endif

namespace rsloss {

constexpr int64_t kWordsPerTask = 256;  // of 64 elements each: enough to pay for waking a thread

// Number of tasks worth starting for `items` of work when a task should get at least `grain` of them.
inline int64_t task_count(int64_t items, int64_t grain) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, items / grain));
}

// Tasks that each hold a table of `bytes`: four at least, more while their tables stay below half a megabyte in all.
inline int64_t limit_by_memory(int64_t tasks, int64_t bytes) {
  return std::min(tasks, std::max<int64_t>(4, (int64_t{1} << 19) / std::max<int64_t>(bytes, 1)));
}

// Runs body(task) for task in [0, tasks). Tasks must not depend on each other nor on the number of threads.
template <class Body>
void run_tasks(int64_t tasks, const Body& body) {
  if (tasks == 1) {
    body(int64_t{0});
    return;
  }
#ifdef RSL_OWN_THREADS
  // For a sanitizer of threads, which sees these start and end, but not those of a pool that was compiled without it.
  std::vector<std::thread> threads;
  for (int64_t task = 0; task < tasks; ++task) threads.emplace_back([&body, task] { body(task); });
  for (std::thread& thread : threads) thread.join();
#else
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
#endif
}

// First item of `task` when `items` are dealt evenly among `tasks`.
inline int64_t task_begin(int64_t items, int64_t tasks, int64_t task) { return items * task / tasks; }

// Runs body(item) for item in [0, items) on so many tasks, each from the first of an even share on. A task that is done takes
// the last ones of the others' shares: one whose processor is slow or late holds up none. Items must not depend on each other.
template <class Body>
void share_items(int64_t items, int64_t tasks, const Body& body) {
  struct alignas(64) Share {
    std::atomic<int64_t> claimed{0};  // of its items; whoever claims one has it
    std::atomic<int64_t> taken_last{0};
  };
  std::vector<Share> shares(static_cast<size_t>(tasks));
  run_tasks(tasks, [&](int64_t task) {
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t owner = (task + i) % tasks, begin = task_begin(items, tasks, owner),
                    end = task_begin(items, tasks, owner + 1);
      Share& share = shares[static_cast<size_t>(owner)];
      for (int64_t first = begin; share.claimed.fetch_add(1, std::memory_order_relaxed) < end - begin;)
        body(owner == task ? first++ : end - 1 - share.taken_last.fetch_add(1, std::memory_order_relaxed));
    }
  });
}

}  // namespace rsloss
