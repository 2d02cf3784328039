// The merge of two partial attention results on the GPU: a thread owns a few 16-byte vectors.
#include "attention/attention.h"
#include "prim/gpu_floats.h"

namespace attention {
namespace {

constexpr int kThreads = 256, kUnroll = 2;

// A block takes part of a token: vectors of its heads, `row_vecs` each.
template <class T, bool kFp8, bool kAligned>
__global__ void __launch_bounds__(kThreads) merge(MergeArgs m, int row_vecs) {
  constexpr int kN = gpu::kVec<T>;
  const int64_t t = blockIdx.x;
  const int base = blockIdx.y * (kThreads * kUnroll) + threadIdx.x;
  const int vecs = static_cast<int>(m.heads) * row_vecs;
  const bool has_prefix = t < m.with_prefix;
  gpu::Vec<T, kN> pre[kUnroll], suf[kUnroll];
  float p[kUnroll], s[kUnroll];
  int head[kUnroll], col[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = base + u * kThreads;
    if (i >= vecs) break;
    head[u] = i / row_vecs;
    col[u] = (i - head[u] * row_vecs) * kN;
    const int n = min(static_cast<int>(m.head_size) - col[u], kN);
    const int64_t h = head[u];
    gpu::load<kAligned>(
        suf[u],
        static_cast<const T*>(m.suffix) + t * m.suffix_stride + h * m.suffix_head_stride + col[u],
        n);
    s[u] = m.suffix_lse[h * m.suffix_lse_stride0 + t * m.suffix_lse_stride1];
    if (has_prefix) {
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
    if (base + u * kThreads >= vecs) break;
    const int n = min(static_cast<int>(m.head_size) - col[u], kN);
    const int64_t h = head[u], at = t * m.out_stride + h * m.out_head_stride + col[u];
    float a = 0.0f, b = 1.0f, top = s[u], small = 0.0f;
    bool alone = true;  // one side passes on unchanged
    gpu::Vec<T, kN> out = suf[u];
    if (has_prefix) {
      const float q = p[u] == INFINITY ? -INFINITY : p[u];
      const float r = s[u] == INFINITY ? -INFINITY : s[u];
      top = fmaxf(q, r);
      if (top == -INFINITY) {
        out = pre[u];
      } else {
        // One of the two exponentials is 1.
        small = gpu::exp2_approx((fminf(q, r) - top) * 1.44269504f);
        const float large = 1.0f / (1.0f + small);
        a = q >= r ? large : small * large;
        b = q >= r ? small * large : large;
        alone = false;
      }
    }
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
      m.out_lse[h * m.out_lse_stride0 + t * m.out_lse_stride1] = top + logf(1.0f + small);
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
    const bool all =
        m.head_size % kN == 0 &&
        gpu::aligned(16, m.prefix, m.suffix, m.prefix_stride * kItem, m.prefix_head_stride * kItem,
                     m.suffix_stride * kItem, m.suffix_head_stride * kItem) &&
        gpu::aligned(kN * out_item, m.out, m.out_stride * out_item, m.out_head_stride * out_item);
    const dim3 blocks(static_cast<unsigned>(m.tokens),
                      static_cast<unsigned>(gpu::ceil_div(m.heads * row_vecs, kThreads * kUnroll)));
    gpu::with_bool(m.out_scale != nullptr, [&](auto fp8) {
      gpu::with_bool(all, [&](auto is_aligned) {
        constexpr bool kFp8 = decltype(fp8)::value, kAligned = decltype(is_aligned)::value;
        merge<T, kFp8, kAligned><<<blocks, kThreads, 0, s>>>(m, static_cast<int>(row_vecs));
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
