// Rotary position embedding on the GPU: a block owns a token, a thread a few steps of its heads.
#include "elementwise/elementwise.h"
#include "elementwise/rotary.cuh"

namespace elementwise {
namespace {

constexpr int kUnroll = 3;

// kShared: a thread's steps all rotate the same pairs, whose angles it loads once.
template <class T, class C, bool kNeox, bool kAligned, bool kShared>
__global__ void rotary(RotaryArgs a, int steps) {
  constexpr int kP = kPairs<T, kNeox>;
  const int64_t token = blockIdx.x, position = a.positions[token];
  if (position < 0 || position >= a.max_position) return;
  const C* row = static_cast<const C*>(a.cos_sin) + position * a.cos_sin_stride;
  const int half = static_cast<int>(a.rot / 2), heads = static_cast<int>(a.query_heads);
  const int total = (heads + static_cast<int>(a.key_heads)) * steps;
  const float sign = a.inverse ? -1.0f : 1.0f;
  T* query = static_cast<T*>(a.query) + token * a.query_token_stride + a.offset;
  T* key = static_cast<T*>(a.key) + token * a.key_token_stride + a.offset;
  auto place = [&](int i, int& first) {
    const int head = i / steps;
    first = (i - head * steps) * kP;
    return head < heads ? query + head * a.query_head_stride
                        : key + (head - heads) * a.key_head_stride;
  };
  for (int base = threadIdx.x; base < total; base += kUnroll * blockDim.x) {
    RotaryStep<T, kNeox> step[kUnroll];
    float cos[kP], sin[kP];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * blockDim.x;
      if (i >= total) break;
      int first;
      const T* p = place(i, first);
      step[u].template load<kAligned>(p, first, half, min(half - first, kP));
      if (kShared && u == 0) {
        load_angles<kAligned>(cos, sin, row, first, half, min(half - first, kP), sign);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * blockDim.x;
      if (i >= total) break;
      int first;
      T* p = place(i, first);
      if (!kShared) {
        load_angles<kAligned>(cos, sin, row, first, half, min(half - first, kP), sign);
      }
      step[u].rotate(cos, sin);
      step[u].template store<kAligned>(p, first, half, min(half - first, kP));
    }
  }
}

}  // namespace

void rotary_embedding(const RotaryArgs& a, Stream stream) {
  gpu::with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    gpu::with_bool(a.neox, [&](auto neox) {
      constexpr bool kNeox = decltype(neox)::value;
      constexpr int64_t kItem = sizeof(T);
      const int64_t half = a.rot / 2, steps = gpu::ceil_div(half, kPairs<T, kNeox>);
      const int64_t total = steps * (a.query_heads + a.key_heads);
      const int64_t wanted = gpu::ceil_div(gpu::ceil_div(total, kUnroll), 32) * 32;
      const int threads = static_cast<int>(wanted < 512 ? wanted : 512);
      gpu::with_float(a.cos_sin_dtype, [&](auto table) {
        using C = decltype(table);
        const bool all =
            half % kPairs<T, kNeox> == 0 &&
            gpu::aligned(16, a.query, a.key, a.offset * kItem, half * kItem * (kNeox ? 1 : 2),
                         a.query_token_stride * kItem, a.query_head_stride * kItem,
                         a.key_token_stride * kItem, a.key_head_stride * kItem, a.cos_sin,
                         half * sizeof(C), a.cos_sin_stride * sizeof(C));
        gpu::with_bool(all, [&](auto is_aligned) {
          gpu::with_bool(32 % steps == 0, [&](auto shared) {
            rotary<T, C, kNeox, decltype(is_aligned)::value, decltype(shared)::value>
                <<<static_cast<unsigned>(a.tokens), threads, 0, gpu::stream_of(stream)>>>(
                    a, static_cast<int>(steps));
          });
        });
      });
    });
  });
  GPU_CHECK_LAUNCH("rotary_embedding");
}

}  // namespace elementwise
