// Keys and values into the paged cache of the flash layout on the CPU.
#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {
namespace {

struct Side {
  void* cache;
  int64_t block_stride, page_stride, head_stride;
  const float* scale;
};

template <cpu::Stores kStores, class T>
void store_flash(const ReshapeAndCacheFlashArgs& a, const Side& side, const T* src, int64_t slot) {
  const int64_t item = cache_item(a.dtype, a.format), d = a.head_size;
  char* at = static_cast<char*>(side.cache) + item * (slot / a.block_size * side.block_stride +
                                                      slot % a.block_size * side.page_stride);
  const bool scaled = a.format != KvFormat::kCopy;
  if (side.head_stride == d && a.scale_stride == 0) {  // the heads lie together
    store_run<kStores>(at, src, a.heads * d, a.format, scaled ? side.scale[0] : 1.0f);
    return;
  }
  for (int64_t h = 0; h < a.heads; ++h) {
    const float scale = scaled ? side.scale[h * a.scale_stride] : 1.0f;
    store_run<kStores>(at + h * side.head_stride * item, src + h * d, d, a.format, scale);
  }
}

template <cpu::Stores kStores, class T>
void run_storing(const ReshapeAndCacheFlashArgs& a) {
  const Side key{a.key_cache, a.key_block_stride, a.key_page_stride, a.key_head_stride, a.k_scale};
  const Side value{a.value_cache, a.value_block_stride, a.value_page_stride, a.value_head_stride,
                   a.v_scale};
  cpu::parallel_spans(a.tokens, 4 * sizeof(T) * a.heads * a.head_size, [&](int64_t t, int64_t end) {
    for (; t < end; ++t) {
      const int64_t slot = a.slots[t];
      if (slot < 0 || slot >= a.num_blocks * a.block_size) continue;
      store_flash<kStores>(a, key, static_cast<const T*>(a.key) + t * a.key_stride, slot);
      store_flash<kStores>(a, value, static_cast<const T*>(a.value) + t * a.value_stride, slot);
    }
    if constexpr (kStores == cpu::Stores::kStreamed) cpu::finish_streaming();
  });
}

template <class T>
void run(const ReshapeAndCacheFlashArgs& a) {
  const int64_t moved = 4 * a.tokens * a.heads * a.head_size * static_cast<int64_t>(sizeof(T));
  if (a.format == KvFormat::kCopy && cpu::beyond_caches(moved)) {
    return run_storing<cpu::Stores::kStreamed, T>(a);
  }
  return run_storing<cpu::Stores::kCached, T>(a);
}

}  // namespace

void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& a, Stream /*stream*/) {
  with_float(a.dtype, [&](auto type) { run<decltype(type)>(a); });
}

}  // namespace kvcache
