// Rotary position embedding on the GPU: a block owns a token or a part of one, a thread a few steps
// of its heads.
#include "elementwise/elementwise.h"
#include "elementwise/rotary.cuh"

namespace elementwise {
namespace {

// kShared: a thread's steps all rotate the same pairs, whose angles it loads once.
template <class T, class C, bool kNeox, bool kAligned, bool kShared, int kUnroll, int kThreads,
          int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    rotary(RotaryArgs a, gpu::FastDivisor steps) {
  gpu::launch_dependents();
  constexpr int kP = kPairs<T, kNeox>;
  const int64_t token = blockIdx.x;
  const int half = static_cast<int>(a.rot / 2), heads = static_cast<int>(a.query_heads);
  const int total = (heads + static_cast<int>(a.key_heads)) * steps.divisor;
  const float sign = a.inverse ? -1.0f : 1.0f;
  T* query = static_cast<T*>(a.query) + token * a.query_token_stride + a.offset;
  T* key = static_cast<T*>(a.key) + token * a.key_token_stride + a.offset;
  const int base = blockIdx.y * (kUnroll * blockDim.x) + threadIdx.x;
  RotaryStep<T, kNeox> step[kUnroll];
  T* at[kUnroll];
  int first[kUnroll];
  gpu::prefetch_early(a.positions + token);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = base + u * blockDim.x, head = steps.quotient(i);
    if (i >= total) break;
    first[u] = (i - head * steps.divisor) * kP;
    at[u] = head < heads ? query + head * a.query_head_stride
                         : key + (head - heads) * a.key_head_stride;
    gpu::prefetch_early(at[u] + first[u]);
  }
  gpu::dependency_wait();
  // The heads exist whatever the position: load them while it is on its way.
  const int64_t position = a.positions[token];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * blockDim.x >= total) break;
    step[u].template load<kAligned>(at[u], first[u], half, min(half - first[u], kP));
  }
  if (position < 0 || position >= a.max_position) return;
  const C* row = static_cast<const C*>(a.cos_sin) + position * a.cos_sin_stride;
  Angles<C, kP> angles;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * blockDim.x >= total) break;
    const int n = min(half - first[u], kP);
    if (!kShared || u == 0) angles.template load<kAligned>(row, first[u], half, n);
    step[u].rotate(angles, sign);
    step[u].template store<kAligned>(at[u], first[u], half, n);
  }
}

// A launch: kUnroll steps a thread, at most kThreads threads.
template <class T, class C, bool kNeox, bool kAligned, bool kShared, int kUnroll, int kThreads,
          int kMinBlocks>
void launch(const RotaryArgs& a, int64_t steps, gpu::Stream stream) {
  const int64_t total = steps * (a.query_heads + a.key_heads);
  const int64_t wanted = gpu::ceil_div(gpu::ceil_div(total, kUnroll), 32) * 32;
  const int64_t threads = wanted < kThreads ? wanted : kThreads;
  const dim3 grid(static_cast<unsigned>(a.tokens),
                  static_cast<unsigned>(gpu::ceil_div(total, kUnroll * threads)));
  gpu::launch_overlapped("rotary_embedding",
                         rotary<T, C, kNeox, kAligned, kShared, kUnroll, kThreads, kMinBlocks>,
                         grid, static_cast<int>(threads), stream, a, gpu::FastDivisor(steps));
}

}  // namespace

void rotary_embedding(const RotaryArgs& a, Stream stream) {
  gpu::with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    gpu::with_bool(a.neox, [&](auto neox) {
      constexpr bool kNeox = decltype(neox)::value;
      constexpr int64_t kItem = sizeof(T);
      const int64_t half = a.rot / 2, steps = gpu::ceil_div(half, kPairs<T, kNeox>);
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
            const gpu::Stream s = gpu::stream_of(stream);
            // Few tokens: a step a thread, in many blocks; many: two, for the loads in flight.
            if (a.tokens < 64) {
              launch<T, C, kNeox, kAligned, kShared, 1, 128, 1>(a, steps, s);
            } else {
              launch<T, C, kNeox, kAligned, kShared, 2, 288, 3>(a, steps, s);
            }
          });
        });
      });
    });
  });
}

}  // namespace elementwise
