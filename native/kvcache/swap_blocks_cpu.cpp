// Whole blocks between two places of host memory.
#include <cstring>

#include "kvcache/cache.h"
#include "prim/cpu_parallel.h"

namespace kvcache {

void swap_blocks(const SwapBlocksArgs& a, Stream /*stream*/) {
  cpu::parallel_for(a.n, 2 * a.bytes, [&](int64_t i) {
    const int64_t* pair = a.pairs + i * a.pair_stride;
    std::memcpy(static_cast<char*>(a.dst) + pair[a.column_stride] * a.bytes,
                static_cast<const char*>(a.src) + pair[0] * a.bytes, a.bytes);
  });
}

void swap_blocks_batch(const SwapBatchArgs& a, Stream /*stream*/) {
  cpu::parallel_for(a.n, 2 * (a.n > 0 ? a.sizes[0] : 1), [&](int64_t i) {
    if (a.sizes[i] == 0) return;  // nothing may have no address
    std::memcpy(reinterpret_cast<void*>(a.dst_ptrs[i]),
                reinterpret_cast<const void*>(a.src_ptrs[i]), a.sizes[i]);
  });
}

}  // namespace kvcache
