// Which instruction set the CPU kernels use, decided once at run time.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RSL_HAS_X86_VARIANTS 1
#include <immintrin.h>
#else
#define RSL_HAS_X86_VARIANTS 0
#endif
// Older compilers do not know what came after AVX-512, or cannot ask for it.
#define RSL_KNOWS_EXTENSIONS (RSL_HAS_X86_VARIANTS && __GNUC__ >= 11)

namespace rsloss {

enum class Isa { kPlain, kAvx2, kAvx512 };

// RSLOSS_CPU_CAPABILITY=avx512|avx2|plain holds the kernels below what the processor has, to test the other variants; avx512:
// without what came after it. Whatever else it is: all that the processor has.
inline bool is_held_to(const char* capability) {
  const char* wanted = std::getenv("RSLOSS_CPU_CAPABILITY");
  return wanted != nullptr && std::strcmp(wanted, capability) == 0;
}

inline Isa detect_isa() {
#if RSL_HAS_X86_VARIANTS
  if (is_held_to("plain")) return Isa::kPlain;
  __builtin_cpu_init();
  // All that common/for_each_isa.h compiles for; hypervisors mask single features.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
                        __builtin_cpu_supports("lzcnt");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && !is_held_to("avx2")) return Isa::kAvx512;
  if (has_avx2) return Isa::kAvx2;
#endif
  return Isa::kPlain;
}

inline Isa isa() {
  static const Isa value = detect_isa();
  return value;
}

// Whether kernels for AVX-512 may use its conversion to bfloat16.
inline bool has_bfloat16_conversion() {
#if RSL_KNOWS_EXTENSIONS
  static const bool value = isa() == Isa::kAvx512 && !is_held_to("avx512") && __builtin_cpu_supports("avx512bf16");
  return value;
#else
  return false;
#endif
}

// Whether a gather of AVX-512 is faster than loads one by one: of Intel's processors since those with tiles, which need no
// microcode against what gathers gave away; of AMD's none is.
inline bool has_fast_gathers() {
#if RSL_KNOWS_EXTENSIONS
  static const bool value = isa() == Isa::kAvx512 && !is_held_to("avx512") && __builtin_cpu_supports("amx-tile");
  return value;
#else
  return false;
#endif
}

}  // namespace rsloss

// Calls `function` of the namespace of the instruction set at hand; the arguments follow in parentheses.
#if RSL_HAS_X86_VARIANTS
#define RSL_ISA_CALL(function, ...)                                                    \
  (::rsloss::isa() == ::rsloss::Isa::kAvx512 ? ::rsloss::avx512::function(__VA_ARGS__) \
   : ::rsloss::isa() == ::rsloss::Isa::kAvx2 ? ::rsloss::avx2::function(__VA_ARGS__)   \
                                             : ::rsloss::plain::function(__VA_ARGS__))
#else
#define RSL_ISA_CALL(function, ...) ::rsloss::plain::function(__VA_ARGS__)
#endif
