// Numbers below the normal range as zeros: results that are such take an x86 processor a hundred times as long.
#pragma once

#include "common/isa.h"

namespace rsloss {

// While one lives, results of this thread that would be below the normal range are 0, if that is wanted. Operands are taken as
// they are.
class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
#if RSL_HAS_X86_VARIANTS
  explicit FlushSubnormals(bool wanted) : before_(_mm_getcsr()) { _mm_setcsr(before_ | (wanted ? _MM_FLUSH_ZERO_ON : 0)); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  explicit FlushSubnormals(bool) {}
#endif
};

}  // namespace rsloss
