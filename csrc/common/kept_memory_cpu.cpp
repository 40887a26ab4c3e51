#include "common/kept_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rsloss {

#if defined(__linux__)
namespace {

constexpr size_t kDefaultLimit = size_t{256} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

// In front of the memory that a tensor sees; as long as a cache line, which leaves that memory aligned.
struct alignas(64) Block {
  size_t bytes;  // with this header
};

size_t limit() {
  const char* wanted = std::getenv("RSLOSS_KEPT_MEMORY_MIB");
  char* end = nullptr;
  const unsigned long long mebibytes = wanted ? std::strtoull(wanted, &end, 10) : 0;
  return end != wanted && wanted ? static_cast<size_t>(mebibytes) << 20 : kDefaultLimit;
}

// Eight sizes between a power of two and the next, so that batches of nearly one size share blocks.
size_t rounded(size_t bytes) {
  size_t step = kSmallestKept / 8;
  while (bytes > 16 * step) step *= 2;
  return (bytes + step - 1) / step * step;
}

class Keeper {
 public:
  const size_t limit = rsloss::limit();

  Block* take(size_t bytes) {
    // A thread that would have to wait, the child of a fork whose parent held the lock among them, does without.
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    for (size_t k = idle_.size(); k-- > 0;) {
      if (idle_[k]->bytes != bytes) continue;
      Block* block = idle_[k];
      idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(k));
      idle_bytes_ -= bytes;
      return block;
    }
    return nullptr;
  }

  void keep(Block* block) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) {
      release(block);
      return;
    }
    idle_.push_back(block);
    idle_bytes_ += block->bytes;
    size_t oldest = 0;  // the longest idle go first
    for (; idle_bytes_ > limit; ++oldest) {
      idle_bytes_ -= idle_[oldest]->bytes;
      release(idle_[oldest]);
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(oldest));
  }

 private:
  static void release(Block* block) { munmap(block, block->bytes); }

  std::mutex mutex_;
  std::vector<Block*> idle_;  // in the order in which they were returned
  size_t idle_bytes_ = 0;
};

// Never destroyed: tensors may outlive everything at the end of the process.
Keeper& keeper() {
  static Keeper* const instance = new Keeper;
  return *instance;
}

}  // namespace

void* take_memory(size_t bytes) {
  const size_t used = bytes + sizeof(Block), wanted = rounded(used);
  if (wanted > keeper().limit) return nullptr;
  Block* block = keeper().take(wanted);
  if (!block) {
    void* fresh = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) return nullptr;
    // The last huge page is backed whole: it is asked for where more than half of it is used.
    const size_t huge = (used + kHugePage / 2) / kHugePage * kHugePage;
    if (huge > 0) madvise(fresh, std::min(huge, wanted), MADV_HUGEPAGE);
    block = static_cast<Block*>(fresh);
    block->bytes = wanted;
  }
  return block + 1;
}

void return_memory(void* data) { keeper().keep(static_cast<Block*>(data) - 1); }

#else

void* take_memory(size_t) { return nullptr; }
void return_memory(void*) {}

#endif

}  // namespace rsloss
