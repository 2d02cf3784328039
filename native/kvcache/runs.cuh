// One vector of floats into a cache: copied or as codes.
#pragma once

#include "prim/gpu_fp8.h"

namespace kvcache {

// The type of a cache item.
template <class T, KvFormat kFormat>
struct CacheItem {
  using type = uint8_t;
};
template <class T>
struct CacheItem<T, KvFormat::kCopy> {
  using type = T;
};
template <class T, KvFormat kFormat>
using CacheItemT = typename CacheItem<T, kFormat>::type;

template <class T, KvFormat kFormat, int kN>
__device__ inline gpu::Vec<CacheItemT<T, kFormat>, kN> convert(const gpu::Vec<T, kN>& v,
                                                               const gpu::Divisor& divisor) {
  if constexpr (kFormat == KvFormat::kCopy) {
    return v;
  } else {
    gpu::Vec<uint8_t, kN> codes;
    gpu::quantize<kFormat>(codes, v, divisor);
    return codes;
  }
}

}  // namespace kvcache
