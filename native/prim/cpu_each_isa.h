// Includes LANES_KERNEL once for each instruction set; see cpu_lanes.h. No include guard: every
// kernel has its own turn.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in g++ 12's own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define LANES_ISA 3
namespace avx512 {
#include "prim/cpu_lanes_of_isa.h"
#include LANES_KERNEL
}  // namespace avx512
#undef LANES_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LANES_ISA 2
namespace avx2 {
#include "prim/cpu_lanes_of_isa.h"
#include LANES_KERNEL
}  // namespace avx2
#undef LANES_ISA
#pragma GCC pop_options

#endif

#define LANES_ISA 1
namespace portable {
#include "prim/cpu_lanes_of_isa.h"
#include LANES_KERNEL
}  // namespace portable
#undef LANES_ISA
#undef LANES_KERNEL
#pragma GCC diagnostic pop
