// The merge of two partial attention results on the GPU: a warp takes a few 16-byte vectors of one
// token, a block neighbouring tokens, which share the sectors of the log-sum-exps.
#include "attention/attention.h"
#include "prim/gpu_fp8.h"

namespace attention {
namespace {

constexpr int kThreads = 128;

// `row_vecs` vectors per head.
template <class T, bool kFp8, bool kAligned, int kUnroll, int kTokens, int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    merge(MergeArgs m, gpu::FastDivisor row_vecs, gpu::FastDivisor parts) {
  gpu::launch_dependents();
  constexpr int kN = gpu::kVec<T>, kLanes = kThreads / kTokens;  // of one token
  // Blocks that follow each other take the parts of the same tokens.
  const uint32_t tokens = parts.quotient(blockIdx.x), part = blockIdx.x - tokens * parts.divisor;
  const int64_t t = static_cast<int64_t>(tokens) * kTokens + threadIdx.x / kLanes;
  if (t >= m.tokens) return;
  const int base = part * (kLanes * kUnroll) + threadIdx.x % kLanes;
  const int vecs = static_cast<int>(m.heads) * row_vecs.divisor;
  const bool has_prefix = t < m.with_prefix;
  gpu::Kept<gpu::Vec<T, kN>> pre[kUnroll], suf[kUnroll];
  float p[kUnroll], s[kUnroll];
  int head[kUnroll], col[kUnroll];
  auto prefix_at = [&](int64_t h, int d) {
    return static_cast<const T*>(m.prefix) + t * m.prefix_stride + h * m.prefix_head_stride + d;
  };
  auto suffix_at = [&](int64_t h, int d) {
    return static_cast<const T*>(m.suffix) + t * m.suffix_stride + h * m.suffix_head_stride + d;
  };
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = base + u * kLanes;
    if (i >= vecs) break;
    head[u] = row_vecs.quotient(i);
    col[u] = (i - head[u] * row_vecs.divisor) * kN;
    gpu::prefetch_early(suffix_at(head[u], col[u]));
    if (has_prefix) gpu::prefetch_early(prefix_at(head[u], col[u]));
  }
  gpu::dependency_wait();
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * kLanes >= vecs) break;
    const int n = min(static_cast<int>(m.head_size) - col[u], kN);
    const int64_t h = head[u];
    gpu::load<kAligned>(suf[u], suffix_at(head[u], col[u]), n);
    s[u] =
        gpu::ld_with_neighbours(m.suffix_lse + h * m.suffix_lse_stride0 + t * m.suffix_lse_stride1);
    if (has_prefix) {
      gpu::load<kAligned>(pre[u], prefix_at(head[u], col[u]), n);
      p[u] = gpu::ld_with_neighbours(m.prefix_lse + h * m.prefix_lse_stride0 +
                                     t * m.prefix_lse_stride1);
    }
  }
  const float inverse = kFp8 ? 1.0f / *m.out_scale : 1.0f;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * kLanes >= vecs) break;
    const int n = min(static_cast<int>(m.head_size) - col[u], kN);
    const int64_t h = head[u], at = t * m.out_stride + h * m.out_head_stride + col[u];
    float a = 0.0f, b = 1.0f, top = s[u], small = 0.0f;
    bool alone = true;  // one side passes on unchanged
    gpu::Kept<gpu::Vec<T, kN>> kept = suf[u];
    if (has_prefix) {
      const float q = p[u] == INFINITY ? -INFINITY : p[u];
      const float r = s[u] == INFINITY ? -INFINITY : s[u];
      top = fmaxf(q, r);
      if (top == -INFINITY) {
        kept = pre[u];
      } else {
        // One of the two exponentials is 1.
        small = gpu::exp2_approx((fminf(q, r) - top) * 1.44269504f);
        const float large = 1.0f / (1.0f + small);
        a = q >= r ? large : small * large;
        b = q >= r ? small * large : large;
        alone = false;
      }
    }
    gpu::Vec<T, kN> out = kept.get();
    gpu::Vec<float, kN> x;
    if (!alone) {
      const gpu::Vec<T, kN> before = pre[u].get(), after = suf[u].get();
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
        const float2 v = gpu::pair_at(before, j), w = gpu::pair_at(after, j);
        x.at[j] = v.x * a + w.x * b;
        x.at[j + 1] = v.y * a + w.y * b;
        if constexpr (!kFp8) gpu::set_pair(out, j, {x.at[j], x.at[j + 1]});
      }
    } else if constexpr (kFp8) {
#pragma unroll
      for (int j = 0; j < kN; ++j) x.at[j] = gpu::to_float(out.at[j]);
    }
    if constexpr (kFp8) {
#pragma unroll
      for (int j = 0; j < kN; ++j) x.at[j] *= inverse;
      const auto codes =
          gpu::quantized_by_product<KvFormat::kE4M3>(gpu::Kept(x), gpu::Divisor(1.0f));
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
  gpu::begin_overlapped();
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
    gpu::with_bool(m.out_scale != nullptr, [&](auto fp8) {
      gpu::with_bool(all, [&](auto is_aligned) {
        constexpr bool kFp8 = decltype(fp8)::value, kAligned = decltype(is_aligned)::value;
        constexpr int kUnroll = 2, kTokens = 8;
        const int64_t parts = gpu::ceil_div(m.heads * row_vecs, kThreads / kTokens * kUnroll);
        const auto blocks = static_cast<unsigned>(gpu::ceil_div(m.tokens, kTokens) * parts);
        gpu::launch_overlapped("merge_attn_states", merge<T, kFp8, kAligned, kUnroll, kTokens, 5>,
                               dim3(blocks), kThreads, s, m, gpu::FastDivisor(row_vecs),
                               gpu::FastDivisor(parts));
      });
    });
  });
  if (!in_place) return;
  const auto blocks = static_cast<unsigned>(gpu::ceil_div(m.tokens * m.heads, kThreads));
  gpu::launch_overlapped("merge_attn_states (lse)", merge_lse, dim3(blocks), kThreads, s, given);
}

}  // namespace attention
