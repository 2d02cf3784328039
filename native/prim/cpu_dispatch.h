// Which instruction sets the processor has, and plain loops compiled for each of them. Kernels with
// vectors of their own are in cpu_lanes.h.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cpu {

enum class Isa : int32_t { kPortable = 1, kAvx2 = 2, kAvx512 = 3 };

// The instruction set to use: the best of this processor, unless a test has set a limit.
extern Isa chosen_isa;
inline Isa isa() { return chosen_isa; }

#if defined(__x86_64__)
// Conversions of fp16. Not by __builtin_cpu_supports, of which clang knows no such feature.
inline bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0 && __builtin_cpu_supports("avx");
}
#endif

// The levels x86-64-v3 and x86-64-v4, by the features that tell them (clang before 18 knows none of
// the names). Every processor with these of v3 has its lzcnt and movbe too.
inline Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && has_f16c();
  if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (v3) return Isa::kAvx2;
#endif
  return Isa::kPortable;
}

// VECTORISED marks a function with a plain loop that the compiler vectorises. It is called as
// vectorised<f>(...), which has its text compiled for each instruction set.
#define VECTORISED inline __attribute__((always_inline))

#if defined(__x86_64__)
template <auto loop, class... Args>
__attribute__((target("arch=x86-64-v4"))) auto with_avx512(Args... args) {
  return loop(args...);
}
template <auto loop, class... Args>
__attribute__((target("arch=x86-64-v3"))) auto with_avx2(Args... args) {
  return loop(args...);
}
#endif

template <auto loop, class... Args>
auto vectorised(Args... args) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return with_avx512<loop>(args...);
  if (isa() == Isa::kAvx2) return with_avx2<loop>(args...);
#endif
  return loop(args...);
}

// Before a loop whose iterations do not depend on each other, whatever its pointers say.
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

}  // namespace cpu
