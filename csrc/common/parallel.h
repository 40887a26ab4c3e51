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

// Items dealt evenly among tasks, in pieces. A task takes those of its own share from the first on, then the last ones of the
// others' shares, so that a processor which is slow or late holds up the others by little. The very last are left to the owner,
// who is about to take them, and whose cache may have what they read and write.
class Shares {
 public:
  Shares(int64_t items, int64_t tasks, int64_t piece)
      : items_(items),
        tasks_(tasks),
        piece_(piece),
        pieces_((items + piece - 1) / piece),
        shares_(static_cast<size_t>(tasks)) {}

  // Calls body(begin, end) for the pieces that the task gets; every task must come once.
  template <class Body>
  void take(int64_t task, const Body& body) {
    for (int64_t i = 0; i < tasks_; ++i) {
      const int64_t owner = (task + i) % tasks_;
      const int64_t first = task_begin(pieces_, tasks_, owner), last = task_begin(pieces_, tasks_, owner + 1);
      Share& share = shares_[static_cast<size_t>(owner)];
      for (int64_t own = first; claim(share, last - first, i == 0);) {
        const int64_t piece = i == 0 ? own++ : last - 1 - share.taken_last.fetch_add(1, std::memory_order_relaxed);
        body(piece * piece_, std::min((piece + 1) * piece_, items_));
      }
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> claimed{0};  // whoever claims a piece has one
    std::atomic<int64_t> taken_last{0};
  };
  static constexpr int64_t kLeft = 2;

  static bool claim(Share& share, int64_t size, bool is_owner) {
    if (!is_owner && share.claimed.load(std::memory_order_relaxed) + kLeft >= size) return false;
    return share.claimed.fetch_add(1, std::memory_order_relaxed) < size;
  }

  int64_t items_, tasks_, piece_, pieces_;
  std::vector<Share> shares_;
};

// Runs body(item) for item in [0, items) on so many tasks. Items must not depend on each other.
template <class Body>
void share_items(int64_t items, int64_t tasks, const Body& body, int64_t piece = 1) {
  Shares shares(items, tasks, piece);
  run_tasks(tasks, [&](int64_t task) {
    shares.take(task, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) body(item);
    });
  });
}

}  // namespace rsloss
