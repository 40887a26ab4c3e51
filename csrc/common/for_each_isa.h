// Compiles the file named by RSL_SIMD_BODY once per instruction set, each in a namespace of its own: avx512, avx2 and plain.
// The body sees RSL_ISA (512, 256 or 0). It must not instantiate templates of the standard library: those would be shared with
// code for older processors. Not a header in the usual sense: include it once per body.
#include "common/isa.h"

#if RSL_HAS_X86_VARIANTS

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#define RSL_ISA 512
namespace rsloss::avx512 {
#include RSL_SIMD_BODY
}
#undef RSL_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt,lzcnt")
#define RSL_ISA 256
namespace rsloss::avx2 {
#include RSL_SIMD_BODY
}
#undef RSL_ISA
#pragma GCC pop_options

#endif

#define RSL_ISA 0
namespace rsloss::plain {
#include RSL_SIMD_BODY
}
#undef RSL_ISA
#undef RSL_SIMD_BODY
