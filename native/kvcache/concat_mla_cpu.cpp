// MLA cache entries on the CPU: latent and rotary part side by side.
#include <algorithm>

#include "elementwise/rotary.h"
#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {
namespace {

template <class T>
void store_entry(char* entry, const T* kv_c, const T* k_pe, int64_t latent, int64_t rope,
                 DType dtype, KvFormat format, float scale) {
  store_run(entry, kv_c, latent, format, scale);
  store_run(entry + latent * cache_item(dtype, format), k_pe, rope, format, scale);
}

// The entry of a slot, or null for a slot outside the cache.
char* entry_of(const ConcatMlaArgs& a, int64_t slot, int64_t item) {
  if (slot < 0 || slot >= a.num_blocks * a.block_size) return nullptr;
  return static_cast<char*>(a.cache) +
         item * (slot / a.block_size * a.block_stride + slot % a.block_size * a.entry_stride);
}

template <class T>
void store_token(const ConcatMlaArgs& a, int64_t t, char* entry) {
  store_entry(entry, static_cast<const T*>(a.kv_c) + t * a.kv_c_stride,
              static_cast<const T*>(a.k_pe) + t * a.k_pe_stride, a.latent, a.rope, a.dtype,
              a.format, a.scale == nullptr ? 1.0f : *a.scale);
}

template <class T>
void store_ds_mla(const ConcatMlaArgs& a, int64_t t, uint8_t* entry) {
  const T* kv_c = static_cast<const T*>(a.kv_c) + t * a.kv_c_stride;
  constexpr int64_t kTiles = kDsMlaLatent / kDsMlaTile;
  float scales[kTiles];  // all of them before any code, so that no tile waits for another
  PICK_ISA(scales_of_groups<T>)(scales, kv_c, kTiles, kDsMlaTile, GroupScale{true, true});
  PICK_ISA(quantize_groups<T>)(entry, scales, kv_c, kTiles, kDsMlaTile);
  std::memcpy(entry + kDsMlaScales, scales, sizeof scales);
  uint8_t* rope = entry + kDsMlaRope;
  if (a.rope == 0) {
    std::memset(rope, 0, kDsMlaEntry - kDsMlaRope);
  } else {
    std::memcpy(rope, static_cast<const T*>(a.k_pe) + t * a.k_pe_stride, a.rope * sizeof(T));
  }
}

template <class T>
void run_rope(const ConcatMlaRopeArgs& a) {
  const ConcatMlaArgs& m = a.mla;
  const int64_t cost = 2 * sizeof(T) * (m.latent + m.rope * (a.heads + 1));
  cpu::parallel_spans(m.tokens, cost, [&](int64_t t, int64_t end) {
    elementwise::Rotation<T> rotation(m.rope, a.neox);
    for (; t < end; ++t) {
      char* entry = entry_of(m, m.slots[t], cache_item(m.dtype, m.format));
      const int64_t position = a.positions[t];
      if (entry == nullptr || position < 0 || position >= a.max_position) continue;
      rotation.load(static_cast<const T*>(a.cos_sin) + position * a.cos_sin_stride, 1.0f);
      rotation.turn(static_cast<T*>(a.q_pe) + t * a.q_token_stride, a.heads, a.q_head_stride);
      rotation.turn(static_cast<T*>(const_cast<void*>(m.k_pe)) + t * m.k_pe_stride, 1, 0);
      store_token<T>(m, t, entry);
    }
  });
}

}  // namespace

void concat_and_cache_mla(const ConcatMlaArgs& a, Stream /*stream*/) {
  const int64_t item = cache_item(a.dtype, a.format);
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    cpu::parallel_for(a.tokens, 2 * sizeof(T) * (a.latent + a.rope), [&](int64_t t) {
      char* entry = entry_of(a, a.slots[t], item);
      if (entry != nullptr) store_token<T>(a, t, entry);
    });
  });
}

void concat_and_cache_ds_mla(const ConcatMlaArgs& a, Stream /*stream*/) {
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    cpu::parallel_for(a.tokens, 3 * kDsMlaEntry, [&](int64_t t) {
      char* entry = entry_of(a, a.slots[t], 1);
      if (entry != nullptr) store_ds_mla<T>(a, t, reinterpret_cast<uint8_t*>(entry));
    });
  });
}

void concat_and_cache_mla_grouped(const ConcatMlaGroupedArgs& a, Stream /*stream*/) {
  using T = cpu::BFloat16;
  const int64_t item = cache_item(DType::kBFloat16, a.format);
  cpu::parallel_for(a.layers * a.tokens, 4 * (a.latent + a.rope), [&](int64_t i) {
    const int64_t layer = i / a.tokens, t = i % a.tokens;
    const int64_t slot = a.slots[layer * a.slot_layer_stride + t * a.slot_stride];
    if (slot < 0) return;
    char* entry =
        reinterpret_cast<char*>(a.cache_ptrs[layer]) +
        item * (slot / a.block_size * a.block_stride + slot % a.block_size * a.entry_stride);
    const T* kv_c = static_cast<const T*>(a.kv_c) + layer * a.kv_c_layer_stride + t * a.kv_c_stride;
    const T* k_pe = static_cast<const T*>(a.k_pe) + layer * a.k_pe_layer_stride + t * a.k_pe_stride;
    store_entry(entry, kv_c, k_pe, a.latent, a.rope, DType::kBFloat16, a.format,
                a.scales == nullptr ? 1.0f : a.scales[layer]);
  });
}

void concat_and_cache_mla_rope_fused(const ConcatMlaRopeArgs& a, Stream /*stream*/) {
  with_float(a.mla.dtype, [&](auto type) { run_rope<decltype(type)>(a); });
}

}  // namespace kvcache
