// The indexer's keys into their cache on the CPU: e4m3 codes with a scale a group.
#include <vector>

#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {

void indexer_k_quant_and_cache(const IndexerQuantArgs& a, Stream /*stream*/) {
  const int64_t groups = a.head_size / a.group;
  const GroupScale rule{false, a.scale_format != ScaleFormat::kFloat32};
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto quantize_groups = PICK_ISA(quantize_groups<T>);
    cpu::parallel_for(a.tokens, 3 * a.head_size, [&](int64_t t) {
      const int64_t slot = a.slots[t];
      if (slot < 0 || slot >= a.num_blocks * a.block_size) return;
      uint8_t* block = a.cache + slot / a.block_size * a.block_stride;
      const int64_t first = slot % a.block_size * a.head_size;
      thread_local std::vector<float> scales;
      scales.resize(groups);
      quantize_groups(block + first, scales.data(), static_cast<const T*>(a.k) + t * a.head_size,
                      groups, a.group, rule);
      if (a.scale_format == ScaleFormat::kExponentByte) {
        for (float& scale : scales) {
          scale = cpu::float_of((cpu::bits_of(scale) >> 23) * 0x01010101u);
        }
      }
      std::memcpy(block + a.block_size * a.head_size + first / a.group * 4, scales.data(),
                  groups * sizeof(float));
    });
  });
}

}  // namespace kvcache
