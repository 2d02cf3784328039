// Rotary position embedding on the GPU: a block owns a token or a part of one, a thread a few steps
// of its heads.
#include "elementwise/elementwise.h"
#include "elementwise/rotary.cuh"

namespace elementwise {
namespace {

// Strides in bytes, uint32_t where all of them fit: an address then is a few products of 32 bits.
template <class Stride>
struct Heads {
  char* at;  // the first rotated element
  Stride token, head;
};

template <class Stride>
struct Rotation {
  Heads<Stride> query, key;
  const int64_t* positions;
  const char* cos_sin;
  Stride cos_sin_stride, positions_end;
  int half;
  uint32_t query_heads, total;  // total: steps of a token
  float sign;
  gpu::FastDivisor steps;  // of a head
  // Prefetch distance in tokens, and bytes of a token (streams alone).
  uint32_t ahead = 0, query_bytes = 0, key_bytes = 0;
};

// kShared: a thread's steps all rotate the same pairs, whose angles it loads once. kStreams: more
// than the L2 holds, heads side by side that are rotated from end to end: tokens are
// prefetched, and plain loads and stores are better than those with hints (H200).
template <class T, class C, bool kNeox, class Stride, bool kAligned, bool kShared, int kUnroll,
          int kThreads, int kMinBlocks, bool kStreams>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    rotary(const __grid_constant__ Rotation<Stride> a) {
  gpu::launch_dependents();
  constexpr int kP = kPairs<T, kNeox>;
  const Stride token = blockIdx.x;
  const uint32_t base = blockIdx.y * (kUnroll * blockDim.x) + threadIdx.x;
  RotaryStep<T, kNeox, !kStreams> step[kUnroll];
  T* at[kUnroll];
  int first[kUnroll];
  gpu::prefetch_early(a.positions + token);
  if (kStreams && (threadIdx.x | blockIdx.y) == 0) {
    const uint64_t later = token + a.ahead;
    auto ask = [&](const Heads<Stride>& heads, uint32_t bytes) {
      if (later < gridDim.x && bytes > 0)
        gpu::prefetch_range(heads.at + later * heads.token, bytes);
    };
    ask(a.query, a.query_bytes);
    ask(a.key, a.key_bytes);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t i = base + u * blockDim.x, head = a.steps.quotient(i);
    if (i >= a.total) break;
    const bool key = head >= a.query_heads;
    const Heads<Stride>& heads = key ? a.key : a.query;
    first[u] = static_cast<int>(i - head * a.steps.divisor) * kP;
    at[u] =
        reinterpret_cast<T*>(heads.at + static_cast<uint64_t>(token) * heads.token +
                             static_cast<uint64_t>(key ? head - a.query_heads : head) * heads.head);
    gpu::prefetch_early(at[u] + first[u]);
  }
  gpu::dependency_wait();
  // The heads exist whatever the position: load them while it is on its way.
  const int64_t position = a.positions[token];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * blockDim.x >= a.total) break;
    step[u].template load<kAligned>(at[u], first[u], a.half, min(a.half - first[u], kP));
  }
  // A position past the table leaves its token alone. Not by a return here: the compiler would put
  // the loads behind it.
  const bool inside = static_cast<uint64_t>(position) < a.positions_end;
  const C* row = reinterpret_cast<const C*>(
      a.cos_sin +
      static_cast<uint64_t>(static_cast<Stride>(inside ? position : 0)) * a.cos_sin_stride);
  Angles<C, kP> angles;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * blockDim.x >= a.total) break;
    const int n = min(a.half - first[u], kP);
    if (!kShared || u == 0) angles.template load<kAligned>(row, first[u], a.half, n);
    step[u].rotate(angles, a.sign);
    if (inside) step[u].template store<kAligned>(at[u], first[u], a.half, n);
  }
}

// A launch: kUnroll steps per thread, at most kThreads threads.
template <class T, class C, bool kNeox, class Stride, bool kAligned, bool kShared, int kUnroll,
          int kThreads, int kMinBlocks, bool kStreams = false>
void launch(const RotaryArgs& a, int64_t steps, gpu::Stream stream) {
  constexpr int64_t kItem = sizeof(T), kEntry = sizeof(C);
  const int64_t total = steps * (a.query_heads + a.key_heads);
  const int64_t wanted = gpu::ceil_div(gpu::ceil_div(total, kUnroll), 32) * 32;
  const int64_t threads = wanted < kThreads ? wanted : kThreads;
  auto heads = [&](void* first, int64_t token, int64_t head) -> Heads<Stride> {
    return {static_cast<char*>(first) + a.offset * kItem, static_cast<Stride>(token * kItem),
            static_cast<Stride>(head * kItem)};
  };
  Rotation<Stride> args = {heads(a.query, a.query_token_stride, a.query_head_stride),
                           heads(a.key, a.key_token_stride, a.key_head_stride),
                           a.positions,
                           static_cast<const char*>(a.cos_sin),
                           static_cast<Stride>(a.cos_sin_stride * kEntry),
                           static_cast<Stride>(a.max_position),
                           static_cast<int>(a.rot / 2),
                           static_cast<uint32_t>(a.query_heads),
                           static_cast<uint32_t>(total),
                           a.inverse ? -1.0f : 1.0f,
                           gpu::FastDivisor(steps)};
  if constexpr (kStreams) {
    args.query_bytes = static_cast<uint32_t>(a.query_heads * a.rot * kItem);
    args.key_bytes = static_cast<uint32_t>(a.key_heads * a.rot * kItem);
    args.ahead = gpu::kAheadBytes / (args.query_bytes + args.key_bytes);
  }
  const dim3 grid(static_cast<unsigned>(a.tokens),
                  static_cast<unsigned>(gpu::ceil_div(total, kUnroll * threads)));
  gpu::launch_overlapped(
      "rotary_embedding",
      rotary<T, C, kNeox, Stride, kAligned, kShared, kUnroll, kThreads, kMinBlocks, kStreams>, grid,
      static_cast<int>(threads), stream, args);
}

// Whether there is more than an L2 holds, in whole tokens.
bool streams(const RotaryArgs& a, int64_t item) {
  constexpr int64_t kMuch = 64 << 20;
  return a.query_head_stride == a.rot && (a.key_heads == 0 || a.key_head_stride == a.rot) &&
         a.tokens * (a.query_heads + a.key_heads) * a.rot * item > kMuch;
}

}  // namespace

void rotary_embedding(const RotaryArgs& a, Stream stream) {
  if (a.query_heads + a.key_heads == 0) return;
  if (a.max_position == 0) return;  // no position is inside
  gpu::with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    gpu::with_bool(a.neox, [&](auto neox) {
      constexpr bool kNeox = decltype(neox)::value;
      constexpr int64_t kItem = sizeof(T);
      const int64_t half = a.rot / 2, steps = gpu::ceil_div(half, kPairs<T, kNeox>);
      gpu::with_float(a.cos_sin_dtype, [&](auto table) {
        using C = decltype(table);
        const gpu::Stream s = gpu::stream_of(stream);
        const bool aligned =
            half % kPairs<T, kNeox> == 0 &&
            gpu::aligned(16, a.query, a.key, a.offset * kItem, half * kItem * (kNeox ? 1 : 2),
                         a.query_token_stride * kItem, a.query_head_stride * kItem,
                         a.key_token_stride * kItem, a.key_head_stride * kItem, a.cos_sin,
                         half * sizeof(C), a.cos_sin_stride * sizeof(C));
        const bool narrow = gpu::narrow(a.query_token_stride * kItem, a.query_head_stride * kItem,
                                        a.key_token_stride * kItem, a.key_head_stride * kItem,
                                        a.cos_sin_stride * sizeof(C), a.max_position);
        if (!aligned || !narrow) {
          return launch<T, C, kNeox, uint64_t, false, false, 1, 128, 1>(a, steps, s);
        }
        gpu::with_bool(32 % steps == 0, [&](auto shared) {
          constexpr bool kShared = decltype(shared)::value;
          // Few tokens: a step a thread, in many blocks; many: two, for the loads in flight.
          if (a.tokens < 64) {
            launch<T, C, kNeox, uint32_t, true, kShared, 1, 128, 1>(a, steps, s);
          } else if (streams(a, kItem)) {
            launch<T, C, kNeox, uint32_t, true, kShared, 2, 288, 3, true>(a, steps, s);
          } else {
            launch<T, C, kNeox, uint32_t, true, kShared, 2, 288, 3>(a, steps, s);
          }
        });
      });
    });
  });
}

}  // namespace elementwise
