// The merge of two partial attention results on the CPU: a task is one head of one token, and those
// of a batch are weighed together.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention/attention.h"
#include "prim/cpu_dispatch.h"
#include "prim/cpu_floats.h"
#include "prim/cpu_lanes.h"
#include "prim/cpu_parallel.h"

namespace attention {
namespace {

// Some heads, perhaps of several tokens.
constexpr int64_t kHeadsAtOnce = 32;
struct Heads {
  alignas(64) float prefix[kHeadsAtOnce] = {}, suffix[kHeadsAtOnce] = {}, lse[kHeadsAtOnce];
};

#define LANES_KERNEL "attention/merge_attn_states_lanes.h"
#include "prim/cpu_each_isa.h"

template <class T>
VECTORISED void weighted_fp8(uint8_t* __restrict out, const T* __restrict prefix,
                             const T* __restrict suffix, int64_t n, float a, float b,
                             float inverse) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = cpu::to_float(prefix[i]) * a + cpu::to_float(suffix[i]) * b;
    out[i] = cpu::to_fp8<cpu::Fp8::kE4M3>(x * inverse);
  }
}

// One row unchanged, as codes.
template <class T>
VECTORISED void pass_on_fp8(uint8_t* __restrict out, const T* __restrict x, int64_t n,
                            float inverse) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = cpu::to_fp8<cpu::Fp8::kE4M3>(cpu::to_float(x[i]) * inverse);
  }
}

// f(j, n, h) for each of `count` heads from the first on, head h of token n.
template <class F>
void for_heads(const MergeArgs& m, int64_t first, int64_t count, const F& f) {
  int64_t n = first / m.heads, h = first % m.heads;
  for (int64_t j = 0; j < count; ++j) {
    f(j, n, h);
    if (++h == m.heads) h = 0, ++n;
  }
}

template <cpu::Stores kStores, class T>
void run_storing(const MergeArgs& m) {
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  const float inverse = m.out_scale == nullptr ? 1.0f : 1.0f / *m.out_scale;
  const int64_t d = m.head_size;
  const auto weighted = PICK_ISA(weighted<kStores, T>);
  const auto weigh = PICK_ISA(weigh);
  cpu::parallel_spans(m.tokens * m.heads, 3 * sizeof(T) * d, [&](int64_t i, int64_t end) {
    Heads heads;
    for (int64_t count; i < end; i += count) {
      count = std::min(kHeadsAtOnce, end - i);
      for_heads(m, i, count, [&](int64_t j, int64_t n, int64_t h) {
        heads.suffix[j] = m.suffix_lse[h * m.suffix_lse_stride0 + n * m.suffix_lse_stride1];
        if (n >= m.with_prefix) return;
        heads.prefix[j] = m.prefix_lse[h * m.prefix_lse_stride0 + n * m.prefix_lse_stride1];
      });
      weigh(heads);
      for_heads(m, i, count, [&](int64_t j, int64_t n, int64_t h) {
        const T* pre =
            static_cast<const T*>(m.prefix) + n * m.prefix_stride + h * m.prefix_head_stride;
        const T* suf =
            static_cast<const T*>(m.suffix) + n * m.suffix_stride + h * m.suffix_head_stride;
        const int64_t at = n * m.out_stride + h * m.out_head_stride;
        const T* alone = nullptr;
        float lse = heads.lse[j];
        if (n >= m.with_prefix) {
          alone = suf;
          lse = m.suffix_lse[h * m.suffix_lse_stride0 + n * m.suffix_lse_stride1];
        } else if (lse == kMinusInf) {
          alone = pre;
        }
        if (m.out_lse != nullptr) m.out_lse[h * m.out_lse_stride0 + n * m.out_lse_stride1] = lse;
        const float a = heads.prefix[j], b = heads.suffix[j];
        if (m.out_scale != nullptr) {
          uint8_t* out = static_cast<uint8_t*>(m.out) + at;
          alone != nullptr ? cpu::vectorised<pass_on_fp8<T>>(out, alone, d, inverse)
                           : cpu::vectorised<weighted_fp8<T>>(out, pre, suf, d, a, b, inverse);
        } else {
          T* out = static_cast<T*>(m.out) + at;
          alone != nullptr ? static_cast<void>(std::memmove(out, alone, d * sizeof(T)))
                           : weighted(out, pre, suf, d, a, b);
        }
      });
    }
    if constexpr (kStores == cpu::Stores::kStreamed) cpu::finish_streaming();
  });
}

template <class T>
void run(const MergeArgs& m) {
  constexpr int64_t kItem = sizeof(T);
  const bool streams =
      m.out_scale == nullptr && cpu::beyond_caches(3 * kItem * m.tokens * m.heads * m.head_size) &&
      cpu::on_lines(m.out, {kItem * m.head_size, kItem * m.out_stride, kItem * m.out_head_stride});
  if (streams) return run_storing<cpu::Stores::kStreamed, T>(m);
  return run_storing<cpu::Stores::kCached, T>(m);
}

}  // namespace

void merge_attn_states(const MergeArgs& args, Stream /*stream*/) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run<float>(args);
    case DType::kFloat16:
      return run<cpu::Half>(args);
    default:
      return run<cpu::BFloat16>(args);
  }
}

}  // namespace attention
