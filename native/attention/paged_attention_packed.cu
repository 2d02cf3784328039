// Tensor-core decode attention over the packed caches of reshape_and_cache.
#include "attention/paged_attention.cuh"

namespace attention {
namespace {

template <class T, KvFormat kFormat>
void by_size(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream) {
  if (a.head_size > 128) return launch_decode<T, kFormat, 256, true, true>(a, splits, stream);
  return a.head_size > 64 ? launch_decode<T, kFormat, 128, true, true>(a, splits, stream)
                          : launch_decode<T, kFormat, 64, true, true>(a, splits, stream);
}

}  // namespace

void decode_packed(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream) {
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
