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

template <class T>
void store_flash(const ReshapeAndCacheFlashArgs& a, const Side& side, const T* src, int64_t slot) {
  const int64_t item = cache_item(a.dtype, a.format), d = a.head_size;
  char* at = static_cast<char*>(side.cache) + item * (slot / a.block_size * side.block_stride +
                                                      slot % a.block_size * side.page_stride);
  const bool scaled = a.format != KvFormat::kCopy;
  if (side.head_stride == d && a.scale_stride == 0) {  // the heads lie together
    store_run(at, src, a.heads * d, a.format, scaled ? side.scale[0] : 1.0f);
    return;
  }
  for (int64_t h = 0; h < a.heads; ++h) {
    const float scale = scaled ? side.scale[h * a.scale_stride] : 1.0f;
    store_run(at + h * side.head_stride * item, src + h * d, d, a.format, scale);
  }
}

// A copy of whole rows, key and value together; both fill whole cache lines.
template <cpu::Stores kStores>
void copy_rows(const ReshapeAndCacheFlashArgs& a) {
  const int64_t item = size_of(a.dtype), bytes = item * a.heads * a.head_size;
  const auto copy_two_runs = PICK_ISA(copy_two_runs<kStores>);
  cpu::parallel_spans(a.tokens, 4 * bytes, [&](int64_t t, int64_t end) {
    for (; t < end; ++t) {
      const int64_t slot = a.slots[t];
      if (slot < 0 || slot >= a.num_blocks * a.block_size) continue;
      const int64_t block = slot / a.block_size, page = slot % a.block_size;
      const int64_t key_at = block * a.key_block_stride + page * a.key_page_stride;
      const int64_t value_at = block * a.value_block_stride + page * a.value_page_stride;
      copy_two_runs(static_cast<char*>(a.key_cache) + item * key_at,
                    static_cast<const char*>(a.key) + item * t * a.key_stride,
                    static_cast<char*>(a.value_cache) + item * value_at,
                    static_cast<const char*>(a.value) + item * t * a.value_stride, bytes);
    }
    if constexpr (kStores == cpu::Stores::kStreamed) cpu::finish_streaming();
  });
}

// Whether copy_rows may do it.
bool whole_lines(const ReshapeAndCacheFlashArgs& a) {
  const int64_t item = size_of(a.dtype), row = a.heads * a.head_size;
  const auto whole = [&](const void* cache, int64_t block, int64_t page, int64_t head) {
    return head == a.head_size && cpu::on_lines(cache, {item * row, item * block, item * page});
  };
  return a.format == KvFormat::kCopy &&
         whole(a.key_cache, a.key_block_stride, a.key_page_stride, a.key_head_stride) &&
         whole(a.value_cache, a.value_block_stride, a.value_page_stride, a.value_head_stride);
}

template <class T>
void run(const ReshapeAndCacheFlashArgs& a) {
  const Side key{a.key_cache, a.key_block_stride, a.key_page_stride, a.key_head_stride, a.k_scale};
  const Side value{a.value_cache, a.value_block_stride, a.value_page_stride, a.value_head_stride,
                   a.v_scale};
  cpu::parallel_spans(a.tokens, 4 * sizeof(T) * a.heads * a.head_size, [&](int64_t t, int64_t end) {
    for (; t < end; ++t) {
      const int64_t slot = a.slots[t];
      if (slot < 0 || slot >= a.num_blocks * a.block_size) continue;
      store_flash(a, key, static_cast<const T*>(a.key) + t * a.key_stride, slot);
      store_flash(a, value, static_cast<const T*>(a.value) + t * a.value_stride, slot);
    }
  });
}

}  // namespace

void reshape_and_cache_flash(const ReshapeAndCacheFlashArgs& a, Stream /*stream*/) {
  if (whole_lines(a)) {
    const int64_t moved = 4 * size_of(a.dtype) * a.tokens * a.heads * a.head_size;
    return cpu::beyond_caches(moved) ? copy_rows<cpu::Stores::kStreamed>(a)
                                     : copy_rows<cpu::Stores::kCached>(a);
  }
  with_float(a.dtype, [&](auto type) { run<decltype(type)>(a); });
}

}  // namespace kvcache
