// Gathers out of the paged cache on the GPU. A warp takes a few rows of the dense tensor: a lane a
// row finds where its entry lies, then all lanes move the entries. Warps need nothing of each
// other, so some look up while others move.
#include "kvcache/cache.h"
#include "prim/gpu_fp8.h"

namespace kvcache {
namespace {

constexpr int kThreads = 128;

// The last sequence that starts at or before `row`, of those from `low` on; -1 if there is none.
__device__ int64_t last_start(const GatherMap& m, int64_t row, int64_t low) {
  int64_t high = m.sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (m.cu[middle] <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

// The same of the rows of a warp, one a lane from `first` on. With up to 32 sequences each lane
// loads the start of one: one load to wait for instead of one for each halving.
__device__ int64_t sequence_of(const GatherMap& m, int64_t first, int64_t row) {
  if (m.sequences > 32) return last_start(m, row, 0);
  const int lane = threadIdx.x % 32;
  const int64_t start = lane < m.sequences ? m.cu[lane] : INT64_MAX;
  const int64_t b = __popc(__ballot_sync(~0u, start <= first)) - 1;
  const int64_t next = __shfl_sync(~0u, start, (b + 1) % 32);
  return b + 1 >= m.sequences || row < next ? b : last_start(m, row, b + 1);
}

// Where the entry of a row lies; a negative block: nowhere, leave the row alone.
struct Entry {
  int64_t block, offset;
};

__device__ Entry find(const GatherMap& m, const gpu::FastDivisor& block_size, int64_t b,
                      int64_t row) {
  constexpr Entry kNowhere = {-1, 0};
  if (b < 0 || b >= m.sequences) return kNowhere;
  const int64_t first = m.cu[b];
  const int64_t end = m.open_end && b == m.sequences - 1 ? m.rows : m.cu[b + 1];
  if (row < first || row >= end) return kNowhere;
  const int64_t p = row - first + (m.starts == nullptr ? 0 : m.starts[b]);
  if (p < 0) return kNowhere;
  const auto place = gpu::place_of(static_cast<uint64_t>(p), block_size);
  const int64_t logical = static_cast<int64_t>(place.block);
  if (logical >= m.table_width) return kNowhere;
  const int64_t block = m.table[b * m.table_stride + logical];
  if (block >= m.num_blocks) return kNowhere;
  return {block, static_cast<int64_t>(place.offset)};
}

// The rows [first, first + kRows) of a warp, one a lane: `place` makes an int64 of the block and
// the offset of each, -1 stands for a row to be left alone.
template <int kRows>
struct Rows {
  int64_t first;

  // Stands for begin_overlapped(): meanwhile the maps come into the L2, the table line by line.
  __device__ explicit Rows(const GatherMap& m) {
    gpu::launch_dependents();
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
    first = warp * kRows;
    if (threadIdx.x % 32 == 0) {
      constexpr int kLine = 32;  // entries
      if (m.seq_of != nullptr) gpu::prefetch_early(m.seq_of + min(first, m.rows - 1));
      const int64_t table_end = (m.sequences - 1) * m.table_stride + m.table_width;
      if (warp * kLine < table_end) gpu::prefetch(m.table + warp * kLine);
      if (warp * kLine < m.sequences) gpu::prefetch(m.cu + warp * kLine);
    }
    gpu::dependency_wait();
  }

  template <class Place>
  __device__ int64_t find_own(const GatherMap& m, const gpu::FastDivisor& block_size,
                              const Place& place) const {
    const int lane = threadIdx.x % 32;
    const int64_t row = first + lane;
    const int64_t b = m.seq_of == nullptr            ? sequence_of(m, first, row)
                      : lane < kRows && row < m.rows ? m.seq_of[row]
                                                     : -1;
    if (lane >= kRows || row >= m.rows) return -1;
    const Entry entry = find(m, block_size, b, row);
    return entry.block < 0 ? -1 : place(entry.block, entry.offset);
  }
};

// Calls load(u, row, step, at) for each of kUnroll steps of this lane, then store(u, row, step):
// `steps` a row, those of all rows dealt out to the lanes in turn. `own` is what find_own() gave.
template <int kRows, int kUnroll, class Load, class Store>
__device__ void move_rows(int64_t own, const gpu::FastDivisor& steps, const Load& load,
                          const Store& store) {
  const uint32_t lane = threadIdx.x % 32, total = kRows * steps.divisor;
  for (uint32_t base = lane; base - lane < total; base += 32 * kUnroll) {
    int64_t at[kUnroll];
    uint32_t row[kUnroll], step[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint32_t i = base + u * 32;
      row[u] = steps.quotient(i);
      step[u] = i - row[u] * steps.divisor;
      at[u] = __shfl_sync(~0u, own, row[u] % 32);
      if (i >= total) at[u] = -1;
      if (at[u] >= 0) load(u, row[u], step[u], at[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at[u] >= 0) store(u, row[u], step[u]);
    }
  }
}

// Bytes as vectors of V.
template <class V, int kRows, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    gather_copy(GatherMap m, const V* src, V* dst, gpu::FastDivisor vecs,
                gpu::FastDivisor block_size, int64_t block_stride, int64_t entry_stride,
                int64_t dst_stride) {
  const Rows<kRows> rows(m);
  const int64_t own = rows.find_own(m, block_size, [&](int64_t block, int64_t off) {
    return block * block_stride + off * entry_stride;
  });
  V v[kUnroll];
  move_rows<kRows, kUnroll>(
      own, vecs, [&](int u, uint32_t, uint32_t step, int64_t at) { v[u] = src[at + step]; },
      [&](int u, uint32_t row, uint32_t step) {
        dst[(rows.first + row) * dst_stride + step] = v[u];
      });
}

// Codes to floats, kN a step.
template <class T, KvFormat kFormat, int kRows, int kUnroll, int kN>
__global__ void __launch_bounds__(kThreads)
    gather_fp8(GatherArgs a, gpu::FastDivisor steps, gpu::FastDivisor block_size) {
  const Rows<kRows> rows(a.map);
  const int64_t own = rows.find_own(a.map, block_size, [&](int64_t block, int64_t off) {
    return block * a.block_stride + off * a.entry_stride;
  });
  const float scale = *a.scale;
  const uint8_t* src = static_cast<const uint8_t*>(a.src);
  gpu::Kept<gpu::Vec<uint8_t, kN>> codes[kUnroll];
  move_rows<kRows, kUnroll>(
      own, steps,
      [&](int u, uint32_t, uint32_t step, int64_t at) {
        gpu::load_once<true>(codes[u], src + at + step * kN);
      },
      [&](int u, uint32_t row, uint32_t step) {
        T* to = static_cast<T*>(a.dst) + (rows.first + row) * a.dst_stride + step * kN;
        if constexpr (kN == 1) {
          *to = gpu::from_float<T>(gpu::from_fp8<kFormat>(codes[u].get().at[0]) * scale);
        } else {
          gpu::Vec<T, kN> out;
          gpu::dequantize<kFormat>(out, codes[u].get(), scale);
          gpu::store_once<true>(to, out);
        }
      });
}

// 16 bytes at an address that is a multiple of 4, or of 16.
template <bool kAligned>
__device__ uint4 load_words(const uint8_t* p) {
  if constexpr (kAligned) return *reinterpret_cast<const uint4*>(p);
  const uint32_t* w = reinterpret_cast<const uint32_t*>(p);
  return {w[0], w[1], w[2], w[3]};
}

// 8 of them, in the first two words.
template <bool kAligned>
__device__ uint4 load_two_words(const uint8_t* p) {
  if constexpr (kAligned) {
    const uint2 both = *reinterpret_cast<const uint2*>(p);
    return {both.x, both.y, 0, 0};
  }
  const uint32_t* w = reinterpret_cast<const uint32_t*>(p);
  return {w[0], w[1], 0, 0};
}

// The 656-byte entries: 8 codes a step, then 8 rotary values a step. A step writes 16 bytes, a warp
// whole sectors.
template <bool kAligned, int kRows, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    upconvert(GatherUpconvertArgs a, gpu::FastDivisor block_size) {
  using T = gpu::BFloat16;
  constexpr int kCodes = 64;
  constexpr gpu::FastDivisor kDivisor(kCodes + 8);  // steps
  const Rows<kRows> rows(a.map);
  // Addresses, as numbers.
  const int64_t own = rows.find_own(a.map, block_size, [&](int64_t block, int64_t off) -> int64_t {
    if (a.host != nullptr) {
      const int64_t entry = block * a.map.block_size + off;
      const int64_t device_row = a.device_rows[entry], host_row = a.host_rows[entry];
      if (device_row < 0) {
        if (host_row < 0 || host_row >= a.host_count) return -1;
        return reinterpret_cast<int64_t>(a.host + host_row * kDsMlaEntry);
      }
      if (device_row >= a.src_blocks * a.map.block_size) return -1;
      const auto place = gpu::place_of(static_cast<uint64_t>(device_row), block_size);
      block = static_cast<int64_t>(place.block), off = static_cast<int64_t>(place.offset);
    }
    return reinterpret_cast<int64_t>(a.src + block * a.block_stride + off * a.entry_stride);
  });
  uint4 words[kUnroll];
  float scale[kUnroll];
  move_rows<kRows, kUnroll>(
      own, kDivisor,
      [&](int u, uint32_t, uint32_t step, int64_t at) {
        const uint8_t* entry = reinterpret_cast<const uint8_t*>(at);
        if (step >= kCodes) {
          words[u] = load_words<kAligned>(entry + kDsMlaRope + (step - kCodes) * 16);
        } else {
          words[u] = load_two_words<kAligned>(entry + step * 8);
          scale[u] = *reinterpret_cast<const float*>(entry + kDsMlaScales + step / 16 * 4);
        }
      },
      [&](int u, uint32_t row, uint32_t step) {
        T* to = static_cast<T*>(a.dst) + (rows.first + row) * a.dst_stride + step * 8;
        gpu::Vec<T, 8> out;
        if (step >= kCodes) {
          memcpy(&out, &words[u], 16);
        } else {
          gpu::Vec<uint8_t, 8> codes;
          memcpy(&codes, &words[u], 8);
          gpu::dequantize<KvFormat::kE4M3>(out, codes, scale[u]);
        }
        gpu::store<kAligned>(to, out);
      });
}

// Codes in 16 bytes a step; each lane copies the scales of its own row.
template <int kRows, int kUnroll>
__global__ void __launch_bounds__(kThreads)
    gather_index(IndexerGatherArgs a, gpu::FastDivisor vecs, gpu::FastDivisor block_size,
                 bool aligned) {
  const Rows<kRows> rows(a.map);
  const uint8_t* scales = nullptr;
  const int64_t own = rows.find_own(a.map, block_size, [&](int64_t block, int64_t off) {
    const int64_t at = block * a.block_stride;
    scales = a.cache + at + a.map.block_size * a.head_size + off * a.scale_bytes;
    return at + off * a.head_size;
  });
  uint4 v[kUnroll];
  move_rows<kRows, kUnroll>(
      own, vecs,
      [&](int u, uint32_t, uint32_t step, int64_t at) {
        const uint8_t* p = a.cache + at + step * 16;
        if (aligned) {
          v[u] = gpu::ld_once(reinterpret_cast<const uint4*>(p));
        } else {
          memcpy(&v[u], p, 16);
        }
      },
      [&](int u, uint32_t row, uint32_t step) {
        uint8_t* q = a.dst_k + (rows.first + row) * a.head_size + step * 16;
        if (aligned) {
          gpu::st_once(reinterpret_cast<uint4*>(q), v[u]);
        } else {
          memcpy(q, &v[u], 16);
        }
      });
  if (scales == nullptr) return;
  uint8_t* q = a.dst_scale + (rows.first + threadIdx.x % 32) * a.scale_bytes;
  for (int64_t j = 0; j < a.scale_bytes; j += 4) {
    if (aligned) {
      *reinterpret_cast<uint32_t*>(q + j) = *reinterpret_cast<const uint32_t*>(scales + j);
    } else {
      memcpy(q + j, scales + j, 4);
    }
  }
}

// Blocks for `rows` rows, kRows a warp.
dim3 grid_for(int64_t rows, int rows_a_warp) {
  return dim3(static_cast<unsigned>(gpu::ceil_div(rows, rows_a_warp * (kThreads / 32))));
}

template <class V>
void copy_as(const GatherArgs& a, gpu::Stream stream) {
  constexpr int64_t kItem = sizeof(V);
  constexpr int kRows = 4, kUnroll = 3;
  const int64_t scale = a.item_bytes;
  gpu::launch_overlapped(
      "gather_cache", gather_copy<V, kRows, kUnroll>, grid_for(a.map.rows, kRows), kThreads, stream,
      a.map, static_cast<const V*>(a.src), static_cast<V*>(a.dst),
      gpu::FastDivisor(a.entry * scale / kItem), gpu::FastDivisor(a.map.block_size),
      a.block_stride * scale / kItem, a.entry_stride * scale / kItem, a.dst_stride * scale / kItem);
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
    gpu::with_float(a.dtype, [&](auto type) {
      gpu::with_bool(a.format == KvFormat::kE5M2, [&](auto e5m2) {
        using T = decltype(type);
        constexpr KvFormat kFormat = decltype(e5m2)::value ? KvFormat::kE5M2 : KvFormat::kE4M3;
        constexpr int kN = gpu::kVec<T>;
        const bool all = gpu::aligned(kN, a.src, a.entry, a.block_stride, a.entry_stride) &&
                         gpu::aligned(16, a.dst, a.dst_stride * sizeof(T));
        auto go = [&](auto kernel, int rows, int64_t steps) {
          gpu::launch_overlapped("gather_and_maybe_dequant_cache", kernel,
                                 grid_for(a.map.rows, rows), kThreads, s, a,
                                 gpu::FastDivisor(steps), gpu::FastDivisor(a.map.block_size));
        };
        if (all) {
          go(gather_fp8<T, kFormat, 2, 3, kN>, 2, a.entry / kN);
        } else {
          go(gather_fp8<T, kFormat, 4, 4, 1>, 4, a.entry);
        }
      });
    });
  }
}

void gather_and_upconvert_ds_mla(const GatherUpconvertArgs& a, Stream stream) {
  constexpr int kRows = 2;
  const bool all = gpu::aligned(16, a.src, a.host, a.block_stride, a.entry_stride, a.dst,
                                a.dst_stride * int64_t{sizeof(gpu::BFloat16)});
  gpu::with_bool(all, [&](auto is_aligned) {
    gpu::launch_overlapped("cp_gather_and_upconvert_fp8_kv_cache",
                           upconvert<decltype(is_aligned)::value, kRows, 5>,
                           grid_for(a.map.rows, kRows), kThreads, gpu::stream_of(stream), a,
                           gpu::FastDivisor(a.map.block_size));
  });
}

void gather_indexer(const IndexerGatherArgs& a, Stream stream) {
  constexpr int kRows = 8;
  const bool all = gpu::aligned(16, a.cache, a.dst_k, a.block_stride, a.head_size) &&
                   gpu::aligned(4, a.dst_scale, a.scale_bytes);
  gpu::launch_overlapped("cp_gather_indexer_k_quant_cache", gather_index<kRows, 2>,
                         grid_for(a.map.rows, kRows), kThreads, gpu::stream_of(stream), a,
                         gpu::FastDivisor(a.head_size / 16), gpu::FastDivisor(a.map.block_size),
                         all);
}

}  // namespace kvcache
