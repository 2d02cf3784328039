// Includes LANES_KERNEL once for each instruction set; see cpu_lanes.h. No include guard: every
// kernel has its own turn.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in g++ 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4"))), apply_to = function)
#pragma clang attribute push(__attribute__((min_vector_width(512))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#define LANES_ISA 3
namespace avx512 {
#include "prim/cpu_lanes_of_isa.h"
#include LANES_KERNEL
}  // namespace avx512
#undef LANES_ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v3"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif
#define LANES_ISA 2
namespace avx2 {
#include "prim/cpu_lanes_of_isa.h"
#include LANES_KERNEL
}  // namespace avx2
#undef LANES_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#define LANES_ISA 1
namespace portable {
#include "prim/cpu_lanes_of_isa.h"
#include LANES_KERNEL
}  // namespace portable
#undef LANES_ISA
#undef LANES_KERNEL
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
