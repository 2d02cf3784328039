// Gathers out of the paged cache on the GPU. A block takes a few rows of the dense tensor: one
// thread a row finds where its entry lies, then all threads move the entries.
#include "kvcache/cache.h"
#include "kvcache/runs.cuh"

namespace kvcache {
namespace {

constexpr int kThreads = 256, kUnroll = 4;

// Entry number (block * block_size + offset) of a row, or -1 to leave the row alone.
__device__ int64_t find(const GatherMap& m, int64_t row) {
  int64_t b;
  if (m.seq_of != nullptr) {
    b = m.seq_of[row];
  } else {  // the last sequence that starts at or before the row
    int64_t low = 0, high = m.sequences;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (m.cu[middle] <= row) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    b = low - 1;
  }
  if (b < 0 || b >= m.sequences) return -1;
  const int64_t first = m.cu[b];
  const int64_t end = m.open_end && b == m.sequences - 1 ? m.rows : m.cu[b + 1];
  if (row < first || row >= end) return -1;
  const int64_t p = row - first + (m.starts == nullptr ? 0 : m.starts[b]);
  if (p < 0) return -1;
  int64_t logical, off;
  gpu::split_slot(p, m.block_size, logical, off);
  if (logical >= m.table_width) return -1;
  const int64_t block = m.table[b * m.table_stride + logical];
  if (block < 0 || block >= m.num_blocks) return -1;
  return block * m.block_size + off;
}

// at[i]: what `place` makes of the entry (block, offset) of row first + i, or `none`.
template <int kRows, class At, class Place>
__device__ void find_rows(const GatherMap& m, int64_t first, At (&at)[kRows], At none,
                          const Place& place) {
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const int64_t entry = first + i < m.rows ? find(m, first + i) : -1;
    at[i] = none;
    if (entry < 0) continue;
    int64_t block, off;
    gpu::split_slot(entry, m.block_size, block, off);
    at[i] = place(entry, block, off);
  }
  __syncthreads();
}

// Bytes as vectors of V.
template <class V, int kRows>
__global__ void __launch_bounds__(kThreads)
    gather_copy(GatherMap m, const V* src, V* dst, int vecs, int64_t block_stride,
                int64_t entry_stride, int64_t dst_stride) {
  __shared__ int64_t at[kRows];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  find_rows<kRows, int64_t>(m, first, at, -1, [&](int64_t, int64_t block, int64_t off) {
    return block * block_stride + off * entry_stride;
  });
  const int total = kRows * vecs;
  for (int base = threadIdx.x; base < total; base += kThreads * kUnroll) {
    V v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads, row = i / vecs;
      if (i < total && at[row] >= 0) v[u] = src[at[row] + (i - row * vecs)];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads, row = i / vecs;
      if (i < total && at[row] >= 0) dst[(first + row) * dst_stride + (i - row * vecs)] = v[u];
    }
  }
}

// Codes to floats, kN a step.
template <class T, KvFormat kFormat, int kRows, int kN>
__global__ void __launch_bounds__(kThreads) gather_fp8(GatherArgs a, int steps) {
  __shared__ int64_t at[kRows];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  find_rows<kRows, int64_t>(a.map, first, at, -1, [&](int64_t, int64_t block, int64_t off) {
    return block * a.block_stride + off * a.entry_stride;
  });
  const float scale = *a.scale;
  const uint8_t* src = static_cast<const uint8_t*>(a.src);
  const int total = kRows * steps;
  for (int base = threadIdx.x; base < total; base += kThreads * kUnroll) {
    gpu::Vec<uint8_t, kN> codes[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads, row = i / steps;
      if (i >= total || at[row] < 0) continue;
      gpu::load<true>(codes[u], src + at[row] + (i - row * steps) * kN);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads, row = i / steps;
      if (i >= total || at[row] < 0) continue;
      T* to = static_cast<T*>(a.dst) + (first + row) * a.dst_stride + (i - row * steps) * kN;
      if constexpr (kN == 1) {
        *to = gpu::from_float<T>(gpu::from_fp8<kFormat>(codes[u].at[0]) * scale);
      } else {
        constexpr int kStored = gpu::kVec<T>;
        gpu::Vec<T, kN> out;
        gpu::dequantize<kFormat>(out, codes[u], scale);
#pragma unroll
        for (int p = 0; p < kN; p += kStored) {
          gpu::Vec<T, kStored> part;
#pragma unroll
          for (int j = 0; j < kStored; ++j) part.at[j] = out.at[p + j];
          gpu::store<true>(to + p, part);
        }
      }
    }
  }
}

// 16 bytes at an address that is a multiple of 4.
__device__ uint4 load_words(const uint8_t* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 == 0) return *reinterpret_cast<const uint4*>(p);
  const uint32_t* w = reinterpret_cast<const uint32_t*>(p);
  return {w[0], w[1], w[2], w[3]};
}

// 8 of them, in the first two words.
__device__ uint4 load_two_words(const uint8_t* p) {
  const uint32_t* w = reinterpret_cast<const uint32_t*>(p);
  if (reinterpret_cast<uintptr_t>(p) % 8 != 0) return {w[0], w[1], 0, 0};
  const uint2 both = *reinterpret_cast<const uint2*>(p);
  return {both.x, both.y, 0, 0};
}

template <int kRows>
__global__ void __launch_bounds__(kThreads) upconvert(GatherUpconvertArgs a) {
  using T = gpu::BFloat16;
  // 8 codes a step, then 8 rotary values a step: a step writes 16 bytes, a warp whole sectors.
  constexpr int kCodes = 64, kSteps = kCodes + 8;
  __shared__ const uint8_t* entries[kRows];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const uint8_t* none = nullptr;
  find_rows<kRows>(a.map, first, entries, none, [&](int64_t entry, int64_t block, int64_t off) {
    if (a.host != nullptr) {
      const int64_t device_row = a.device_rows[entry], host_row = a.host_rows[entry];
      if (device_row < 0) {
        return host_row >= 0 && host_row < a.host_count ? a.host + host_row * kDsMlaEntry : none;
      }
      if (device_row >= a.src_blocks * a.map.block_size) return none;
      gpu::split_slot(device_row, a.map.block_size, block, off);
    }
    return a.src + block * a.block_stride + off * a.entry_stride;
  });
  for (int base = threadIdx.x; base < kRows * kSteps; base += kThreads * kUnroll) {
    uint4 words[kUnroll];
    float scale[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads, row = i / kSteps, step = i - row * kSteps;
      if (i >= kRows * kSteps || entries[row] == nullptr) continue;
      const bool rope = step >= kCodes;
      const uint8_t* p = entries[row] + (rope ? kDsMlaRope + (step - kCodes) * 16 : step * 8);
      words[u] = rope ? load_words(p) : load_two_words(p);
      if (!rope) {
        scale[u] = *reinterpret_cast<const float*>(entries[row] + kDsMlaScales + step / 16 * 4);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads, row = i / kSteps, step = i - row * kSteps;
      if (i >= kRows * kSteps || entries[row] == nullptr) continue;
      const bool rope = step >= kCodes;
      T* to = static_cast<T*>(a.dst) + (first + row) * a.dst_stride + step * 8;
      gpu::Vec<T, 8> out;
      if (rope) {
        memcpy(&out, &words[u], 16);
      } else {
        gpu::Vec<uint8_t, 8> codes;
        memcpy(&codes, &words[u], 8);
        gpu::dequantize<KvFormat::kE4M3>(out, codes, scale[u]);
      }
      if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        gpu::store<true>(to, out);
      } else {
        gpu::store<false>(to, out);
      }
    }
  }
}

template <int kRows>
__global__ void __launch_bounds__(kThreads) gather_index(IndexerGatherArgs a, bool aligned_codes) {
  __shared__ const uint8_t* codes_at[kRows];
  __shared__ const uint8_t* scales_at[kRows];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;
  const uint8_t* none = nullptr;
  __shared__ int64_t entries[kRows];  // block and offset, 32 bits each: 2^31 blocks at most
  find_rows<kRows, int64_t>(a.map, first, entries, -1,
                            [&](int64_t, int64_t block, int64_t off) { return block << 32 | off; });
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const int64_t block = entries[i] >> 32, off = entries[i] & 0xffffffff;
    const uint8_t* from = a.cache + block * a.block_stride;
    codes_at[i] = entries[i] < 0 ? none : from + off * a.head_size;
    scales_at[i] =
        entries[i] < 0 ? none : from + a.map.block_size * a.head_size + off * a.scale_bytes;
  }
  __syncthreads();
  const int vecs = static_cast<int>(a.head_size / 16), words = static_cast<int>(a.scale_bytes / 4);
#pragma unroll 4
  for (int i = threadIdx.x; i < kRows * vecs; i += kThreads) {
    const int row = i / vecs, step = i - row * vecs;
    const uint8_t* p = codes_at[row];
    if (p == nullptr) continue;
    p += step * 16;
    uint8_t* q = a.dst_k + (first + row) * a.head_size + step * 16;
    if (aligned_codes) {
      *reinterpret_cast<uint4*>(q) = *reinterpret_cast<const uint4*>(p);
    } else {
      for (int j = 0; j < 16; ++j) q[j] = p[j];
    }
  }
  for (int i = threadIdx.x; i < kRows * words; i += kThreads) {
    const int row = i / words, step = i - row * words;
    const uint8_t* p = scales_at[row];
    if (p == nullptr) continue;
    p += step * 4;
    uint8_t* q = a.dst_scale + (first + row) * a.scale_bytes + step * 4;
    if (aligned_codes) {
      *reinterpret_cast<uint32_t*>(q) = *reinterpret_cast<const uint32_t*>(p);
    } else {
      for (int j = 0; j < 4; ++j) q[j] = p[j];
    }
  }
}

template <class V>
void copy_as(const GatherArgs& a, gpu::Stream stream) {
  constexpr int64_t kItem = sizeof(V);
  constexpr int kRows = 16;
  const int64_t scale = a.item_bytes;
  gather_copy<V, kRows>
      <<<static_cast<unsigned>(gpu::ceil_div(a.map.rows, kRows)), kThreads, 0, stream>>>(
          a.map, static_cast<const V*>(a.src), static_cast<V*>(a.dst),
          static_cast<int>(a.entry * scale / kItem), a.block_stride * scale / kItem,
          a.entry_stride * scale / kItem, a.dst_stride * scale / kItem);
}

}  // namespace

void gather_cache(const GatherArgs& a, Stream stream) {
  const gpu::Stream s = gpu::stream_of(stream);
  if (a.format == KvFormat::kCopy) {
    auto fits = [&](int64_t bytes) {
      return gpu::aligned(bytes, a.src, a.dst, a.entry * a.item_bytes,
                          a.block_stride * a.item_bytes, a.entry_stride * a.item_bytes,
                          a.dst_stride * a.item_bytes);
    };
    if (fits(16)) {
      copy_as<uint4>(a, s);
    } else if (fits(4)) {
      copy_as<uint32_t>(a, s);
    } else if (fits(2)) {
      copy_as<uint16_t>(a, s);
    } else {
      copy_as<uint8_t>(a, s);
    }
  } else {
    constexpr int kRows = 16;
    const auto blocks = static_cast<unsigned>(gpu::ceil_div(a.map.rows, kRows));
    gpu::with_float(a.dtype, [&](auto type) {
      gpu::with_bool(a.format == KvFormat::kE5M2, [&](auto e5m2) {
        using T = decltype(type);
        constexpr KvFormat kFormat = decltype(e5m2)::value ? KvFormat::kE5M2 : KvFormat::kE4M3;
        constexpr int kN = gpu::kVec<T>;
        const bool all = gpu::aligned(kN, a.src, a.entry, a.block_stride, a.entry_stride) &&
                         gpu::aligned(16, a.dst, a.dst_stride * sizeof(T));
        if (all) {
          gather_fp8<T, kFormat, kRows, kN>
              <<<blocks, kThreads, 0, s>>>(a, static_cast<int>(a.entry / kN));
        } else {
          gather_fp8<T, kFormat, kRows, 1>
              <<<blocks, kThreads, 0, s>>>(a, static_cast<int>(a.entry));
        }
      });
    });
  }
  GPU_CHECK_LAUNCH("gather_cache");
}

void gather_and_upconvert_ds_mla(const GatherUpconvertArgs& a, Stream stream) {
  constexpr int kRows = 16;
  upconvert<kRows><<<static_cast<unsigned>(gpu::ceil_div(a.map.rows, kRows)), kThreads, 0,
                     gpu::stream_of(stream)>>>(a);
  GPU_CHECK_LAUNCH("cp_gather_and_upconvert_fp8_kv_cache");
}

void gather_indexer(const IndexerGatherArgs& a, Stream stream) {
  constexpr int kRows = 32;
  const bool all = gpu::aligned(16, a.cache, a.dst_k, a.block_stride, a.head_size) &&
                   gpu::aligned(4, a.dst_scale, a.scale_bytes);
  gather_index<kRows><<<static_cast<unsigned>(gpu::ceil_div(a.map.rows, kRows)), kThreads, 0,
                        gpu::stream_of(stream)>>>(a, all);
  GPU_CHECK_LAUNCH("cp_gather_indexer_k_quant_cache");
}

}  // namespace kvcache
