// Tensor-core decode attention over caches of logical shape [NB, BS, Hkv, D].
#include "attention/paged_attention.cuh"

namespace attention {
namespace {

template <class T, KvFormat kFormat>
void by_size(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream) {
  const bool wide = a.heads / a.kv_heads > 8;
  if (a.head_size > 128) return launch_decode<T, kFormat, 256, false, true>(a, splits, stream);
  // e5m2 is rare: one kernel, for any number of heads.
  constexpr bool kNarrowToo = kFormat != KvFormat::kE5M2;
  if (wide || !kNarrowToo) {
    return a.head_size > 64 ? launch_decode<T, kFormat, 128, false, true>(a, splits, stream)
                            : launch_decode<T, kFormat, 64, false, true>(a, splits, stream);
  }
  if constexpr (kFormat == KvFormat::kCopy) {
    if (splits.kv_heads == 2) {
      return launch_decode<T, kFormat, 128, false, false, 2>(a, splits, stream);
    }
  }
  if constexpr (kNarrowToo) {
    return a.head_size > 64 ? launch_decode<T, kFormat, 128, false, false>(a, splits, stream)
                            : launch_decode<T, kFormat, 64, false, false>(a, splits, stream);
  }
}

}  // namespace

void decode_flash(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream) {
  switch (a.format) {
    case KvFormat::kCopy:
      return a.dtype == DType::kFloat16
                 ? by_size<gpu::Half, KvFormat::kCopy>(a, splits, stream)
                 : by_size<gpu::BFloat16, KvFormat::kCopy>(a, splits, stream);
    case KvFormat::kE4M3:
      return by_size<gpu::Half, KvFormat::kE4M3>(a, splits, stream);
    case KvFormat::kE5M2:
      return by_size<gpu::Half, KvFormat::kE5M2>(a, splits, stream);
  }
}

}  // namespace attention
