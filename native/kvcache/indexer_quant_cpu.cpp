// The indexer's keys into their cache on the CPU: e4m3 values with a scale per group.
#include <algorithm>
#include <vector>

#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {
namespace {

// Tokens whose scales are found before any of their codes: no token waits for another's.
constexpr int64_t kBatch = 16;

}  // namespace

void indexer_k_quant_and_cache(const IndexerQuantArgs& a, Stream /*stream*/) {
  const int64_t groups = a.head_size / a.group;
  const GroupScale rule{false, a.scale_format != ScaleFormat::kFloat32};
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto scales_of_groups = PICK_ISA(scales_of_groups<T>);
    const auto quantize_groups = PICK_ISA(quantize_groups<T>);
    const int64_t batches = (a.tokens + kBatch - 1) / kBatch;
    cpu::parallel_for(batches, 3 * kBatch * a.head_size, [&](int64_t batch) {
      const int64_t first = batch * kBatch, count = std::min(kBatch, a.tokens - first);
      const T* rows = static_cast<const T*>(a.k) + first * a.head_size;
      thread_local std::vector<float> kept;
      kept.resize(kBatch * groups);
      float* const scales = kept.data();  // a mention of `kept` is a call: one a batch, not a token
      scales_of_groups(scales, rows, count * groups, a.group, rule);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t slot = a.slots[first + i];
        if (slot < 0 || slot >= a.num_blocks * a.block_size) continue;
        uint8_t* block = a.cache + slot / a.block_size * a.block_stride;
        const int64_t at = slot % a.block_size * a.head_size;
        float* of_token = scales + i * groups;
        quantize_groups(block + at, of_token, rows + i * a.head_size, groups, a.group);
        if (a.scale_format == ScaleFormat::kExponentByte) {
          for (int64_t g = 0; g < groups; ++g) {
            of_token[g] = cpu::float_of((cpu::bits_of(of_token[g]) >> 23) * 0x01010101u);
          }
        }
        uint8_t* scale_at = block + a.block_size * a.head_size + at / a.group * 4;
        for (int64_t g = 0; g < groups; ++g) std::memcpy(scale_at + 4 * g, of_token + g, 4);
      }
    });
  });
}

}  // namespace kvcache
