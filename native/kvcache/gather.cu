// Gathers out of the paged cache on the GPU: what is done to the rows that gather_rows.cuh deals
// out.
#include "kvcache/gather_rows.cuh"
#include "prim/gpu_fp8.h"

namespace kvcache {
namespace {

// Bytes as vectors of V.
template <class V, bool kGiven, int kRows, int kUnroll>
__global__ void __launch_bounds__(kGatherThreads)
    gather_copy(GatherMap m, const V* src, V* dst, gpu::FastDivisor vecs,
                gpu::FastDivisor block_size, int64_t block_stride, int64_t entry_stride,
                int64_t dst_stride, Ahead ahead) {
  const Rows<kRows, kGiven> rows(m);
  auto place = [&](int64_t block, int64_t off) {
    return block * block_stride + off * entry_stride;
  };
  auto address = [&](int64_t at) { return src + at; };
  rows.ask_early(m, block_size, ahead, place, address);
  gpu::dependency_wait();
  const int64_t own = rows.find_own(m, block_size, ahead, place, address);
  V v[kUnroll];
  move_rows<kRows, kUnroll>(
      own, vecs, [&](int u, uint32_t, uint32_t step, int64_t at) { v[u] = src[at + step]; },
      [&](int u, uint32_t row, uint32_t step) {
        dst[(rows.first + row) * dst_stride + step] = v[u];
      });
}

// fp8 values to floats, kN per step. Without kAsks nothing is prefetched.
template <class T, KvFormat kFormat, int kRows, int kUnroll, int kN, bool kAsks>
__global__ void __launch_bounds__(kGatherThreads)
    gather_fp8(GatherArgs a, gpu::FastDivisor steps, gpu::FastDivisor block_size, Ahead given) {
  const Ahead ahead = kAsks ? given : Ahead{};
  const Rows<kRows, true> rows(a.map);
  const uint8_t* src = static_cast<const uint8_t*>(a.src);
  auto place = [&](int64_t block, int64_t off) {
    return block * a.block_stride + off * a.entry_stride;
  };
  auto address = [&](int64_t at) { return src + at; };
  rows.ask_early(a.map, block_size, ahead, place, address);
  gpu::dependency_wait();
  const int64_t own = rows.find_own(a.map, block_size, ahead, place, address);
  const float scale = *a.scale;
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

// The 656-byte entries: 8 fp8 values per step, then 8 rotary values per step. A step writes 16
// bytes, a warp whole sectors.
template <bool kAligned, int kRows, int kUnroll>
__global__ void __launch_bounds__(kGatherThreads)
    upconvert(GatherUpconvertArgs a, gpu::FastDivisor block_size, Ahead ahead) {
  using T = gpu::BFloat16;
  constexpr int kCodes = 64;
  constexpr gpu::FastDivisor kDivisor(kCodes + 8);  // steps
  const Rows<kRows, false> rows(a.map);
  // Addresses, as numbers.
  auto place = [&](int64_t block, int64_t off) -> int64_t {
    if (a.host != nullptr) {
      const int64_t entry = block * a.map.block_size + off;
      const int64_t device_row = a.device_rows[entry], host_row = a.host_rows[entry];
      if (device_row < 0) {
        if (host_row < 0 || host_row >= a.host_count) return -1;
        return reinterpret_cast<int64_t>(a.host + host_row * kDsMlaEntry);
      }
      if (device_row >= a.src_blocks * a.map.block_size) return -1;
      const auto on_device = gpu::place_of(static_cast<uint64_t>(device_row), block_size);
      block = static_cast<int64_t>(on_device.block), off = static_cast<int64_t>(on_device.offset);
    }
    return reinterpret_cast<int64_t>(a.src + block * a.block_stride + off * a.entry_stride);
  };
  auto address = [](int64_t at) { return reinterpret_cast<const uint8_t*>(at); };
  rows.ask_early(a.map, block_size, ahead, place, address);
  gpu::dependency_wait();
  const int64_t own = rows.find_own(a.map, block_size, ahead, place, address);
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

// fp8 values in 16 bytes per step; each lane copies the scales of its own row.
template <int kRows, int kUnroll>
__global__ void __launch_bounds__(kGatherThreads)
    gather_index(IndexerGatherArgs a, gpu::FastDivisor vecs, gpu::FastDivisor block_size,
                 bool aligned) {
  const Rows<kRows, false> rows(a.map);
  const uint8_t* scales = nullptr;
  auto place = [&](int64_t block, int64_t off) {
    const int64_t at = block * a.block_stride;
    scales = a.cache + at + a.map.block_size * a.head_size + off * a.scale_bytes;
    return at + off * a.head_size;
  };
  gpu::dependency_wait();
  const int64_t own =
      rows.find_own(a.map, block_size, {}, place, [&](int64_t at) { return a.cache + at; });
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

// Blocks for `rows` rows, kRows per warp.
dim3 grid_for(int64_t rows, int rows_a_warp) {
  return dim3(static_cast<unsigned>(gpu::ceil_div(rows, rows_a_warp * (kGatherThreads / 32))));
}

// For entries of `bytes` bytes whose addresses and sizes are multiples of 16, or are not. Grids of
// fewer than `least` blocks do without (that is quicker: H200).
Ahead ahead_of(bool aligned, int64_t bytes, dim3 grid, int rows_a_warp,
               int64_t least = gpu::kSmallGrid) {
  if (!aligned || grid.x < least) return {};
  const int64_t blocks = gpu::kAheadBytes / (bytes * rows_a_warp * (kGatherThreads / 32));
  return {static_cast<uint32_t>(bytes), static_cast<uint32_t>(blocks)};
}

template <class V>
void copy_as(const GatherArgs& a, gpu::Stream stream) {
  constexpr int64_t kItem = sizeof(V);
  constexpr int kRows = 2, kUnroll = 5;
  const int64_t scale = a.item_bytes;
  const dim3 grid = grid_for(a.map.rows, kRows);
  gpu::launch_overlapped("gather_cache",
                         a.map.seq_of == nullptr ? gather_copy<V, false, kRows, kUnroll>
                                                 : gather_copy<V, true, kRows, kUnroll>,
                         grid, kGatherThreads, stream, a.map, static_cast<const V*>(a.src),
                         static_cast<V*>(a.dst), gpu::FastDivisor(a.entry * scale / kItem),
                         gpu::FastDivisor(a.map.block_size), a.block_stride * scale / kItem,
                         a.entry_stride * scale / kItem, a.dst_stride * scale / kItem,
                         ahead_of(kItem == 16, a.entry * scale, grid, kRows));
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
        auto go = [&](auto kernel, int rows, int64_t steps, const Ahead& ahead) {
          gpu::launch_overlapped(
              "gather_and_maybe_dequant_cache", kernel, grid_for(a.map.rows, rows), kGatherThreads,
              s, a, gpu::FastDivisor(steps), gpu::FastDivisor(a.map.block_size), ahead);
        };
        if (!all) return go(gather_fp8<T, kFormat, 4, 4, 1, false>, 4, a.entry, {});
        const bool whole = gpu::aligned(16, a.src, a.entry, a.block_stride, a.entry_stride);
        const Ahead ahead = ahead_of(whole, a.entry, grid_for(a.map.rows, 2), 2, 256);
        go(ahead.blocks > 0 ? gather_fp8<T, kFormat, 2, 5, kN, true>
                            : gather_fp8<T, kFormat, 2, 3, kN, false>,
           2, a.entry / kN, ahead);
      });
    });
  }
}

void gather_and_upconvert_ds_mla(const GatherUpconvertArgs& a, Stream stream) {
  constexpr int kRows = 2;
  const bool all = gpu::aligned(16, a.src, a.host, a.block_stride, a.entry_stride, a.dst,
                                a.dst_stride * int64_t{sizeof(gpu::BFloat16)});
  const dim3 grid = grid_for(a.map.rows, kRows);
  const Ahead ahead = ahead_of(all && a.host == nullptr, kDsMlaEntry, grid, kRows, 600);
  gpu::with_bool(all, [&](auto is_aligned) {
    gpu::launch_overlapped("cp_gather_and_upconvert_fp8_kv_cache",
                           upconvert<decltype(is_aligned)::value, kRows, 5>, grid, kGatherThreads,
                           gpu::stream_of(stream), a, gpu::FastDivisor(a.map.block_size), ahead);
  });
}

void gather_indexer(const IndexerGatherArgs& a, Stream stream) {
  constexpr int kRows = 8;
  const bool all = gpu::aligned(16, a.cache, a.dst_k, a.block_stride, a.head_size) &&
                   gpu::aligned(4, a.dst_scale, a.scale_bytes);
  gpu::launch_overlapped("cp_gather_indexer_k_quant_cache", gather_index<kRows, 2>,
                         grid_for(a.map.rows, kRows), kGatherThreads, gpu::stream_of(stream), a,
                         gpu::FastDivisor(a.head_size / 16), gpu::FastDivisor(a.map.block_size),
                         all);
}

}  // namespace kvcache
