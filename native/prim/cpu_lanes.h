// One text of a kernel for several instruction sets, its vectors spelled out: for what the compiler
// vectorises badly in a plain loop (16-bit floats, 8-bit codes, reductions).
//
//     #define LANES_KERNEL "elementwise/gated_activation_lanes.h"
//     #include "prim/cpu_each_isa.h"
//
// inside a namespace defines what that file defines three times, in the namespaces avx512, avx2 and
// portable (elsewhere than on x86-64 only in the last); PICK_ISA(f) is the function f of the best
// one that the processor has. Unlike the clones of VECTORISED these are chosen at each call, so
// that tests can try all of them and sanitizers see all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "prim/cpu_floats.h"
#include "prim/cpu_stream.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cpu {

enum class Isa : int32_t { kPortable = 1, kAvx2 = 2, kAvx512 = 3 };

// The instruction set to use: the best of this processor, unless a test has set a limit.
extern Isa chosen_isa;
inline Isa isa() { return chosen_isa; }

#if defined(__x86_64__)
#define PICK_ISA(...)                                        \
  (::cpu::isa() == ::cpu::Isa::kAvx512 ? avx512::__VA_ARGS__ \
   : ::cpu::isa() == ::cpu::Isa::kAvx2 ? avx2::__VA_ARGS__   \
                                       : portable::__VA_ARGS__)
#else
#define PICK_ISA(...) portable::__VA_ARGS__
#endif

}  // namespace cpu
