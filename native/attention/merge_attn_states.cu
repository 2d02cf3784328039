// The merge of two partial attention results on the GPU: a thread owns a few 16-byte vectors.
#include "attention/attention.h"
#include "prim/gpu_floats.h"

namespace attention {
namespace {

constexpr int kThreads = 256, kUnroll = 2;

template <class T, bool kFp8, bool kAligned, class Index>
__global__ void __launch_bounds__(kThreads) merge(MergeArgs m, Index vecs, Index row_vecs) {
  constexpr int kN = gpu::kVec<T>;
  const Index base = static_cast<Index>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  gpu::Vec<T, kN> pre[kUnroll], suf[kUnroll];
  float p[kUnroll], s[kUnroll];
  Index token[kUnroll], head[kUnroll], col[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Index i = base + u * kThreads;
    if (i >= vecs) continue;
    const Index row = i / row_vecs;
    col[u] = (i - row * row_vecs) * kN;
    token[u] = row / static_cast<Index>(m.heads);
    head[u] = row - token[u] * static_cast<Index>(m.heads);
    const int64_t left = m.head_size - col[u];
    const int n = left < kN ? static_cast<int>(left) : kN;
    const int64_t t = token[u], h = head[u];
    gpu::load<kAligned>(
        suf[u],
        static_cast<const T*>(m.suffix) + t * m.suffix_stride + h * m.suffix_head_stride + col[u],
        n);
    s[u] = m.suffix_lse[h * m.suffix_lse_stride0 + t * m.suffix_lse_stride1];
    if (t < m.with_prefix) {
      gpu::load<kAligned>(
          pre[u],
          static_cast<const T*>(m.prefix) + t * m.prefix_stride + h * m.prefix_head_stride + col[u],
          n);
      p[u] = m.prefix_lse[h * m.prefix_lse_stride0 + t * m.prefix_lse_stride1];
    }
  }
  const float inverse = kFp8 ? 1.0f / *m.out_scale : 1.0f;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * kThreads >= vecs) continue;
    const int64_t t = token[u], h = head[u], left = m.head_size - col[u];
    const int n = left < kN ? static_cast<int>(left) : kN;
    float a = 0.0f, b = 1.0f, lse = s[u];
    bool alone = true;  // one side passes on unchanged
    gpu::Vec<T, kN> out = suf[u];
    if (t < m.with_prefix) {
      const float q = p[u] == INFINITY ? -INFINITY : p[u];
      const float r = s[u] == INFINITY ? -INFINITY : s[u];
      const float top = fmaxf(q, r);
      if (top == -INFINITY) {
        out = pre[u];
        lse = -INFINITY;
      } else {
        const float eq = expf(q - top), er = expf(r - top), sum = eq + er;
        a = eq / sum, b = er / sum;
        lse = logf(sum) + top;
        alone = false;
      }
    }
    const int64_t at = t * m.out_stride + h * m.out_head_stride + col[u];
    float x[kN];
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      x[j] = alone ? gpu::to_float(out.at[j])
                   : gpu::to_float(pre[u].at[j]) * a + gpu::to_float(suf[u].at[j]) * b;
      if (!alone) out.at[j] = gpu::from_float<T>(x[j]);
    }
    if constexpr (kFp8) {
      gpu::Vec<uint8_t, kN> codes;
#pragma unroll
      for (int j = 0; j < kN; ++j) x[j] *= inverse;
      gpu::quantize<KvFormat::kE4M3>(codes, x, gpu::Divisor(1.0f));
      gpu::store<kAligned>(static_cast<uint8_t*>(m.out) + at, codes, n);
    } else {
      gpu::store<kAligned>(static_cast<T*>(m.out) + at, out, n);
    }
    if (col[u] == 0 && m.out_lse != nullptr) {
      m.out_lse[h * m.out_lse_stride0 + t * m.out_lse_stride1] = lse;
    }
  }
}

// The log-sum-exps alone, after the rows: other threads of a row read the prefix's, which the
// output's may be.
__global__ void merge_lse(MergeArgs m) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= m.tokens * m.heads) return;
  const int64_t h = i / m.tokens, t = i - h * m.tokens;
  float lse = m.suffix_lse[h * m.suffix_lse_stride0 + t * m.suffix_lse_stride1];
  if (t < m.with_prefix) {
    float p = m.prefix_lse[h * m.prefix_lse_stride0 + t * m.prefix_lse_stride1];
    p = p == INFINITY ? -INFINITY : p;
    lse = lse == INFINITY ? -INFINITY : lse;
    const float top = fmaxf(p, lse);
    lse = top == -INFINITY ? top : logf(expf(p - top) + expf(lse - top)) + top;
  }
  m.out_lse[h * m.out_lse_stride0 + t * m.out_lse_stride1] = lse;
}

}  // namespace

void merge_attn_states(const MergeArgs& given, Stream stream) {
  MergeArgs m = given;
  const bool in_place =
      m.out_lse != nullptr && (m.out_lse == m.prefix_lse || m.out_lse == m.suffix_lse);
  if (in_place) m.out_lse = nullptr;
  const gpu::Stream s = gpu::stream_of(stream);
  gpu::with_float(m.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kN = gpu::kVec<T>, kItem = sizeof(T);
    const int64_t out_item = m.out_scale == nullptr ? kItem : 1;
    const int64_t row_vecs = gpu::ceil_div(m.head_size, kN);
    const int64_t vecs = m.tokens * m.heads * row_vecs;
    const bool all =
        m.head_size % kN == 0 &&
        gpu::aligned(16, m.prefix, m.suffix, m.prefix_stride * kItem, m.prefix_head_stride * kItem,
                     m.suffix_stride * kItem, m.suffix_head_stride * kItem) &&
        gpu::aligned(kN * out_item, m.out, m.out_stride * out_item, m.out_head_stride * out_item);
    const auto blocks = static_cast<unsigned>(gpu::ceil_div(vecs, kThreads * kUnroll));
    gpu::with_bool(m.out_scale != nullptr, [&](auto fp8) {
      gpu::with_bool(all, [&](auto is_aligned) {
        constexpr bool kFp8 = decltype(fp8)::value, kAligned = decltype(is_aligned)::value;
        if (vecs < (1LL << 31)) {
          merge<T, kFp8, kAligned, uint32_t><<<blocks, kThreads, 0, s>>>(m, vecs, row_vecs);
        } else {
          merge<T, kFp8, kAligned, int64_t><<<blocks, kThreads, 0, s>>>(m, vecs, row_vecs);
        }
      });
    });
  });
  GPU_CHECK_LAUNCH("merge_attn_states");
  if (!in_place) return;
  const auto blocks = static_cast<unsigned>(gpu::ceil_div(m.tokens * m.heads, kThreads));
  merge_lse<<<blocks, kThreads, 0, s>>>(given);
  GPU_CHECK_LAUNCH("merge_attn_states (lse)");
}

}  // namespace attention
