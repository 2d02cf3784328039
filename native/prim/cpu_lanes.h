// One text of a kernel for several instruction sets, its vectors spelled out: for what the compiler
// vectorises badly in a plain loop (16-bit floats, fp8 values, reductions).
//
//     #define LANES_KERNEL "elementwise/gated_activation_lanes.h"
//     #include "prim/cpu_each_isa.h"
//
// inside a namespace defines what that file defines three times, in the namespaces avx512, avx2 and
// portable (elsewhere than on x86-64 only in the last); PICK_ISA(f) is the function f of the best
// one that the processor has.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "prim/cpu_dispatch.h"
#include "prim/cpu_floats.h"
#include "prim/cpu_stream.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cpu {

#if defined(__x86_64__)
#define PICK_ISA(...)                                        \
  (::cpu::isa() == ::cpu::Isa::kAvx512 ? avx512::__VA_ARGS__ \
   : ::cpu::isa() == ::cpu::Isa::kAvx2 ? avx2::__VA_ARGS__   \
                                       : portable::__VA_ARGS__)
#else
#define PICK_ISA(...) portable::__VA_ARGS__
#endif

// The items of two vectors by constant indices, those of b counting on from those of a. Places is
// the type of GCC's vector of indices.
#if defined(__clang__)
#define SHUFFLED(Places, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(Places, a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

}  // namespace cpu
