// The indexer's keys into their cache on the CPU: e4m3 codes with a scale a group.
#include <algorithm>

#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {

void indexer_k_quant_and_cache(const IndexerQuantArgs& a, Stream /*stream*/) {
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    cpu::parallel_for(a.tokens, 3 * a.head_size, [&](int64_t t) {
      const int64_t slot = a.slots[t];
      if (slot < 0 || slot >= a.num_blocks * a.block_size) return;
      uint8_t* block = a.cache + slot / a.block_size * a.block_stride;
      const int64_t first = slot % a.block_size * a.head_size;
      const T* k = static_cast<const T*>(a.k) + t * a.head_size;
      for (int64_t d = 0; d < a.head_size; d += a.group) {
        float scale = std::max(PICK_ISA(largest_magnitude<T>)(k + d, a.group), 1e-4f) / 448.0f;
        if (a.scale_format != ScaleFormat::kFloat32) scale = power_of_two_at_least(scale);
        store_run(block + first + d, k + d, a.group, KvFormat::kE4M3, scale);
        uint32_t stored = cpu::bits_of(scale);
        if (a.scale_format == ScaleFormat::kExponentByte) stored = (stored >> 23) * 0x01010101u;
        std::memcpy(block + a.block_size * a.head_size + (first + d) / a.group * 4, &stored, 4);
      }
    });
  });
}

}  // namespace kvcache
