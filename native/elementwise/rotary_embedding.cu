// Rotary position embedding on the GPU: a block owns a token, a thread a few steps of its heads.
#include "elementwise/elementwise.h"
#include "elementwise/rotary.cuh"

namespace elementwise {
namespace {

constexpr int kMaxThreads = 640;

// kShared: a thread's steps all rotate the same pairs, whose angles it loads once.
template <class T, class C, bool kNeox, bool kAligned, bool kShared, int kUnroll>
__global__ void __launch_bounds__(kMaxThreads) rotary(RotaryArgs a, int steps) {
  constexpr int kP = kPairs<T, kNeox>;
  const int64_t token = blockIdx.x, position = a.positions[token];
  const int half = static_cast<int>(a.rot / 2), heads = static_cast<int>(a.query_heads);
  const int total = (heads + static_cast<int>(a.key_heads)) * steps;
  const float sign = a.inverse ? -1.0f : 1.0f;
  T* query = static_cast<T*>(a.query) + token * a.query_token_stride + a.offset;
  T* key = static_cast<T*>(a.key) + token * a.key_token_stride + a.offset;
  for (int base = threadIdx.x; base < total; base += kUnroll * blockDim.x) {
    RotaryStep<T, kNeox> step[kUnroll];
    T* at[kUnroll];
    int first[kUnroll];
    // The heads exist whatever the position: load them while it is on its way.
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * blockDim.x, head = i / steps;
      if (i >= total) break;
      first[u] = (i - head * steps) * kP;
      at[u] = head < heads ? query + head * a.query_head_stride
                           : key + (head - heads) * a.key_head_stride;
      step[u].template load<kAligned>(at[u], first[u], half, min(half - first[u], kP));
    }
    if (position < 0 || position >= a.max_position) return;
    const C* row = static_cast<const C*>(a.cos_sin) + position * a.cos_sin_stride;
    float cos[kP], sin[kP];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * blockDim.x >= total) break;
      const int n = min(half - first[u], kP);
      if (!kShared || u == 0) load_angles<kAligned>(cos, sin, row, first[u], half, n, sign);
      step[u].rotate(cos, sin);
      step[u].template store<kAligned>(at[u], first[u], half, n);
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
      // Few tokens: a step a thread; many: three, for the loads in flight.
      const bool few = a.tokens < 64;
      const int64_t wanted = gpu::ceil_div(gpu::ceil_div(total, few ? 1 : 3), 32) * 32;
      const int threads = static_cast<int>(wanted < kMaxThreads ? wanted : kMaxThreads);
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
            constexpr bool kAligned = decltype(is_aligned)::value;
            constexpr bool kShared = decltype(shared)::value;
            auto go = [&](auto kernel) {
              kernel<<<static_cast<unsigned>(a.tokens), threads, 0, gpu::stream_of(stream)>>>(
                  a, static_cast<int>(steps));
            };
            few ? go(rotary<T, C, kNeox, kAligned, kShared, 1>)
                : go(rotary<T, C, kNeox, kAligned, kShared, 3>);
          });
        });
      });
    });
  });
  GPU_CHECK_LAUNCH("rotary_embedding");
}

}  // namespace elementwise
