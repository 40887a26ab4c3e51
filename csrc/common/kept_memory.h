// Memory of large CPU outputs, kept for the next output of that size once a tensor lets go of it.
//
// A gradient of the logits' size is made anew in every step. The allocator of the C library gives such memory back to the
// system when the tensor goes and gets it anew, page by page, as the kernel writes: for a loss that streams over its logits
// twice that is a good part of the step.
#pragma once

#include <cstddef>

namespace rsloss {

constexpr size_t kSmallestKept = size_t{1} << 17;  // below, the C library keeps its memory by itself

// At least `bytes` of uninitialised memory on a cache line's border, or nullptr where none is kept (RSLOSS_KEPT_MEMORY_MIB=0,
// other systems, more than may be kept): then allocate in the ordinary way.
void* take_memory(size_t bytes);

// What take_memory gave, free for the next.
void return_memory(void* data);

}  // namespace rsloss
