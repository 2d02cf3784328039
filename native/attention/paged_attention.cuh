// Decode attention on tensor cores. A block takes one sequence, up to 16 query heads of one KV head
// and one split of the tokens; each of its warps streams its own tiles of 16 tokens through a ring
// of asynchronous copies and keeps its own online softmax, so that the loop needs no block-wide
// barrier. The warps merge at the end, the splits in a kernel of their own.
//
// 8-bit codes stay codes in shared memory and become fp16 in registers, exactly; their scales are
// factors of the logits and of the result. The query becomes fp16 too, as a power of two times
// values of at most 1. Codes come four to a register, so the order of d inside 16 (and for the
// packed values that of the tokens) is permuted alike on both sides of a product.
#pragma once

#include <cfloat>

#include "attention/attention.h"
#include "prim/gpu_mma.h"

namespace attention {

inline constexpr int kWarps = 4, kThreads = 32 * kWarps, kTile = 16;
inline constexpr int kPartition = 512;  // tokens of a partition of paged_attention_v2
inline constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Where a block leaves its share when there are several: [S, Hq, splits] of D floats, then the
// maxima (base 2) and the sums.
struct Splits {
  int count;
  float *acc, *largest, *sum;
  int block_shift;  // log2 of the block size, or -1
};

// Offsets into the caches are counted in 16 bytes (packed values: 8) and fit 32 bits.
inline constexpr uint32_t kNowhere = 0xffffffffu;

// Tokens of a sequence that its table can name.
__device__ inline int tokens_of(const PagedAttentionArgs& a, int64_t s) {
  const int64_t reach = min(a.table_width * a.block_size, a.longest);
  return static_cast<int>(max(int64_t{0}, min(int64_t{a.lens[s]}, reach)));
}

// Tokens [first, last) of a split: partitions of v2, or equal shares in whole tiles.
__device__ inline void split_of(const PagedAttentionArgs& a, int n, int split, int splits,
                                int& first, int& last) {
  const int share = (n + splits - 1) / splits;
  const int size = a.tmp_out != nullptr ? kPartition : (share + 63) / 64 * 64;
  first = min(split * size, n);
  last = min(first + size, n);
}

// One query head's result of one split: `value` is element d of the sum, not yet normalized.
__device__ inline void write_result(const PagedAttentionArgs& a, const Splits& splits, int64_t s,
                                    int64_t h, int split, int d, float value, float largest,
                                    float sum) {
  auto write = [&](void* out, int64_t at, float x) {
    switch (a.dtype) {
      case DType::kFloat32:
        static_cast<float*>(out)[at] = x;
        break;
      case DType::kFloat16:
        static_cast<gpu::Half*>(out)[at] = gpu::from_float<gpu::Half>(x);
        break;
      default:
        static_cast<gpu::BFloat16*>(out)[at] = gpu::from_float<gpu::BFloat16>(x);
    }
  };
  const float normal = sum > 0.0f ? value / (sum + a.epsilon) : 0.0f;
  if (a.tmp_out != nullptr) {
    const int64_t at = (s * a.heads + h) * a.partitions + split;
    write(a.tmp_out, at * a.head_size + d, normal);
    if (d == 0) {
      a.max_logits[at] = largest <= -FLT_MAX ? largest : largest * kLn2;
      a.exp_sums[at] = sum;
    }
    return;
  }
  if (splits.count > 1) {
    const int64_t at = (s * a.heads + h) * splits.count + split;
    splits.acc[at * a.head_size + d] = value;
    if (d == 0) {
      splits.largest[at] = largest;
      splits.sum[at] = sum;
    }
    return;
  }
  write(a.out, s * a.out_stride + h * a.out_head_stride + d, normal);
  if (d == 0 && a.lse != nullptr) {
    a.lse[h * a.lse_head_stride + s * a.lse_sequence_stride] =
        sum > 0.0f ? largest * kLn2 + logf(sum) : -INFINITY;
  }
}

// A split without tokens: nothing for v2 and for the merge to read but zero sums.
__device__ inline void write_nothing(const PagedAttentionArgs& a, const Splits& splits, int64_t s,
                                     int64_t first_head, int heads, int split, int n) {
  if (a.tmp_out != nullptr && n > 0) return;  // "partitions past the sequence are not written"
  const int d_size = static_cast<int>(a.head_size);
  if (splits.count > 1 || a.tmp_out != nullptr) {
    if (a.tmp_out != nullptr) return;
    if (threadIdx.x < heads) {
      const int64_t at = (s * a.heads + first_head + threadIdx.x) * splits.count + split;
      splits.largest[at] = -INFINITY;
      splits.sum[at] = 0.0f;
    }
    return;
  }
  for (int i = threadIdx.x; i < heads * d_size; i += blockDim.x) {
    write_result(a, splits, s, first_head + i / d_size, split, i % d_size, 0.0f, -INFINITY, 0.0f);
  }
}

// kD: head size rounded up to 64, 128 or 256. kWide: more than 8 query heads a block.
template <class T, KvFormat kFormat, int kD, bool kPacked, bool kWide>
struct Decode {
  static constexpr bool kFp8 = kFormat != KvFormat::kCopy;
  using M = std::conditional_t<kFp8, gpu::Half, T>;  // of the products
  static constexpr int kItem = kFp8 ? 1 : 2;
  static constexpr int kRowBytes = kD * kItem, kChunks = kRowBytes / 16;
  static constexpr int kSideBytes = kTile * kRowBytes;  // keys or values of a tile
  static constexpr int kStageBytes = 2 * kSideBytes;
  static constexpr int kStages = kFp8 ? 4 : 3;
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kQueryBytes = (kWide ? 16 : 8) * kD * 2;
  static constexpr int kRows = kWide ? 16 : 8, kSets = kWide ? 2 : 1;
  static constexpr int kSteps = kD / 16, kOutTiles = kD / 8;
  static constexpr int kSharedBytes = kWarps * kWarpBytes + kQueryBytes;
  static_assert(kRows * kD * 4 + 2 * kRows * 4 <= kWarpBytes, "the merge fits in the ring");

  // Byte of a 16-byte chunk in a side, placed so that 8 rows of one chunk lie in 8 bank groups.
  __device__ static int chunk_at(int row, int chunk) {
    if constexpr (kChunks >= 8) return row * kRowBytes + ((chunk ^ (row & 7)) << 4);
    return row * kRowBytes + ((chunk ^ (row / 2 & (kChunks - 1))) << 4);
  }
  // Packed values: a row is one d, 16 tokens.
  __device__ static int packed_value_at(int d, int chunk) {
    if constexpr (kFp8) return d * 16;
    return d * 32 + ((chunk ^ (d >> 2 & 1)) << 4);
  }
  // Token of column n of logit tile j.
  __device__ static int token_at(int j, int n) {
    return kFp8 && kPacked ? 4 * (n >> 1) + 2 * j + (n & 1) : 8 * j + n;
  }

  const PagedAttentionArgs& a;
  const int32_t* table;
  int lane, n, shift;  // n: end of the split
  uint32_t ring;
  const char *keys, *values;                  // this lane's chunk of token 0 of the KV head
  uint32_t k_block, k_page, v_block, v_page;  // strides in the units of offsets

  // Where the keys and values of token row `lane % 16` of a tile lie, or kNowhere.
  struct Row {
    uint32_t k, v;
  };
  __device__ Row row_of(int t) const {
    const int token = t + lane % kTile;
    if (token >= n) return {kNowhere, kNowhere};
    const uint32_t size = static_cast<uint32_t>(a.block_size);
    const uint32_t logical =
        shift >= 0 ? static_cast<uint32_t>(token) >> shift : static_cast<uint32_t>(token) / size;
    const uint32_t off = token - logical * size;
    const int block = table[logical];
    if (block < 0 || block >= a.num_blocks) return {kNowhere, kNowhere};
    const uint32_t in_value = kPacked ? off * kItem / 8 : off * v_page;
    return {block * k_block + off * k_page, block * v_block + in_value};
  }

  __device__ void issue(int stage, const Row& mine) const {
    const uint32_t k_at = ring + stage * kStageBytes, v_at = k_at + kSideBytes;
    constexpr int kRowsAtOnce = 32 / kChunks;
    const int used = static_cast<int>(a.head_size) * kItem / 16;
    const int tail = static_cast<int>(a.head_size) * kItem % 16;  // 8-byte rest of fp8 rows
    const int c = lane % kChunks;
    const bool whole = c < used, half = kFp8 && !kPacked && c == used && tail != 0;
#pragma unroll
    for (int i = 0; i < kTile; i += kRowsAtOnce) {
      const int row = i + lane / kChunks;
      const uint32_t k = __shfl_sync(~0u, mine.k, row);
      const bool valid = k != kNowhere;
      const char* k_from = keys + static_cast<uint64_t>(valid ? k : 0) * 16;
      if (whole) gpu::copy_async<16>(k_at + chunk_at(row, c), k_from, valid);
      if constexpr (!kPacked) {
        const uint32_t v = __shfl_sync(~0u, mine.v, row);
        const char* v_from = values + static_cast<uint64_t>(valid ? v : 0) * 16;
        if (whole) gpu::copy_async<16>(v_at + chunk_at(row, c), v_from, valid);
        if (half) {
          gpu::copy_async<8>(k_at + chunk_at(row, c), k_from, valid);
          gpu::copy_async<8>(v_at + chunk_at(row, c), v_from, valid);
        }
      }
    }
    if constexpr (kPacked) {  // 8 tokens of one d a copy
      const uint32_t v[2] = {__shfl_sync(~0u, mine.v, 0), __shfl_sync(~0u, mine.v, 8)};
      const uint32_t from = lane % 2 == 0 ? v[0] : v[1];
      const bool valid = from != kNowhere;
      const char* base = values + static_cast<uint64_t>(valid ? from : 0) * 8;
      for (int d = lane / 2; d < a.head_size; d += 16) {
        gpu::copy_async<8 * kItem>(
            v_at + (kFp8 ? packed_value_at(d, 0) + lane % 2 * 8 : packed_value_at(d, lane % 2)),
            base + d * a.block_size * kItem, valid);
      }
    }
  }

  // The block's query rows into shared memory, as products take them; powers: what was taken out
  // of each. All threads call it.
  __device__ static void stage_query(const PagedAttentionArgs& a, char* staging, float* powers,
                                     int64_t s, int64_t first_head, int heads) {
    constexpr int kRowThreads = kD / 8;  // 8 elements each; 8 to 32 neighbouring lanes a row
    constexpr int kPasses = kRows * kRowThreads / kThreads > 0 ? kRows * kRowThreads / kThreads : 1;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = threadIdx.x + pass * kThreads, g = i / kRowThreads, d = i % kRowThreads * 8;
      const int64_t at = s * a.query_stride + (first_head + g) * a.query_head_stride + d;
      float x[8], largest = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] = 0.0f;
        if (g < heads && d < a.head_size) {  // head sizes are multiples of 8
          x[j] = a.dtype == DType::kFloat16
                     ? gpu::to_float(static_cast<const gpu::Half*>(a.query)[at + j])
                     : gpu::to_float(static_cast<const gpu::BFloat16*>(a.query)[at + j]);
        }
        largest = fmaxf(largest, fabsf(x[j]));
      }
      float taken = 1.0f;
      if constexpr (kFp8) {
#pragma unroll
        for (int offset = kRowThreads / 2; offset > 0; offset /= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
        }
        if (largest > 1e-30f && largest < 1e30f) taken = gpu::power_of_two_at_least(largest);
      }
      gpu::Vec<M, 8> row;
#pragma unroll
      for (int j = 0; j < 8; ++j) row.at[j] = gpu::from_float<M>(x[j] * (1.0f / taken));
      if (g < kRows) {
        gpu::store<true>(reinterpret_cast<M*>(staging) + g * kD + d, row);
        if (d == 0) powers[g] = taken;
      }
    }
  }

  // Query fragments from the staged rows, and the factors taken out of this lane's rows.
  __device__ void load_query(uint32_t (&q)[kSteps][4], float (&factor)[kSets], const char* staging,
                             const float* powers) const {
    const int row = lane / 4, quad = lane % 4;
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      if (set < kSets) factor[set] = powers[row + 8 * set];
      const uint32_t* from = reinterpret_cast<const uint32_t*>(staging) +
                             (row + 8 * (set < kSets ? set : 0)) * (kD / 2);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int low = kFp8 ? step * 8 + quad * 2 : step * 8 + quad;
        q[step][set] = set < kSets ? from[low] : 0;
        q[step][set + 2] = set < kSets ? from[kFp8 ? low + 1 : low + 4] : 0;
      }
    }
  }

  __device__ static void widen(uint32_t codes, uint32_t& b0, uint32_t& b1) {
    gpu::from_fp8x4<kFormat>(codes, b0, b1);
  }

  __device__ void logits(float (&c)[2][4], const uint32_t (&q)[kSteps][4], uint32_t side) const {
    const int matrix = lane / 8, r = lane % 8;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][i] = 0.0f;
    }
    if constexpr (kFp8) {
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t codes[4], b0, b1;
        gpu::load_matrices(codes, side + chunk_at(token_at(matrix & 1, r), step + matrix / 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          widen(codes[i], b0, b1);
          gpu::multiply_add<M>(c[i & 1], q[step + i / 2], b0, b1);
        }
      }
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        gpu::load_matrices(b, side + chunk_at(token_at(matrix / 2, r), 2 * step + (matrix & 1)));
        gpu::multiply_add<M>(c[0], q[step], b[0], b[1]);
        gpu::multiply_add<M>(c[1], q[step], b[2], b[3]);
      }
    }
  }

  // `left`: tokens of the tile before the end of the split; packed values past it may be anything.
  __device__ void accumulate(float (&o)[kOutTiles][4], const uint32_t (&p)[4], uint32_t side,
                             int left) const {
    const int matrix = lane / 8, r = lane % 8, quad = lane % 4;
    if constexpr (kPacked && kFp8) {
      uint32_t keep = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) keep |= 4 * quad + i < left ? 0xffu << (8 * i) : 0u;
#pragma unroll
      for (int tile = 0; tile < kOutTiles; tile += 4) {
        uint32_t codes[4], b0, b1;
        gpu::load_matrices(codes, side + packed_value_at((tile + matrix) * 8 + r, 0));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          widen(codes[i] & keep, b0, b1);
          gpu::multiply_add<M>(o[tile + i], p, b0, b1);
        }
      }
    } else if constexpr (kPacked) {
      uint32_t keep[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        keep[i / 2] |= 8 * (i / 2) + 2 * quad + i % 2 < left ? 0xffffu << (16 * (i % 2)) : 0u;
      }
#pragma unroll
      for (int tile = 0; tile < kOutTiles; tile += 2) {
        uint32_t b[4];
        gpu::load_matrices(b, side + packed_value_at((tile + matrix / 2) * 8 + r, matrix & 1));
        gpu::multiply_add<M>(o[tile], p, b[0] & keep[0], b[1] & keep[1]);
        gpu::multiply_add<M>(o[tile + 1], p, b[2] & keep[0], b[3] & keep[1]);
      }
    } else if constexpr (kFp8) {
      // Transposed pairs of codes: (token, d), (token, d + 1), (token + 1, d), (token + 1, d + 1).
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += 2) {
        uint32_t pairs[4], even[4], odd[4];
        gpu::load_matrices_transposed(pairs,
                                      side + chunk_at((matrix & 1) * 8 + r, chunk + matrix / 2));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          widen(__byte_perm(pairs[i], 0, 0x3120), even[i], odd[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          gpu::multiply_add<M>(o[2 * (chunk + i)], p, even[2 * i], even[2 * i + 1]);
          gpu::multiply_add<M>(o[2 * (chunk + i) + 1], p, odd[2 * i], odd[2 * i + 1]);
        }
      }
    } else {
#pragma unroll
      for (int tile = 0; tile < kOutTiles; tile += 2) {
        uint32_t b[4];
        gpu::load_matrices_transposed(b, side + chunk_at((matrix & 1) * 8 + r, tile + matrix / 2));
        gpu::multiply_add<M>(o[tile], p, b[0], b[1]);
        gpu::multiply_add<M>(o[tile + 1], p, b[2], b[3]);
      }
    }
  }

  // d of column 2 * quad + e of output tile t.
  __device__ static int d_at(int tile, int quad, int e) {
    if constexpr (kFp8 && !kPacked) return tile / 2 * 16 + 4 * quad + 2 * e + tile % 2;
    return tile * 8 + 2 * quad + e;
  }
};

template <class T, KvFormat kFormat, int kD, bool kPacked, bool kWide>
__global__ void __launch_bounds__(kThreads, kD > 128                     ? 1
                                            : kFormat == KvFormat::kCopy ? 2
                                                                         : 3)
    decode(const __grid_constant__ PagedAttentionArgs a, Splits splits) {
  using W = Decode<T, kFormat, kD, kPacked, kWide>;
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int split = blockIdx.x;
  const int64_t s = blockIdx.z, group = a.heads / a.kv_heads;
  const int64_t tiles = (group + W::kRows - 1) / W::kRows;
  const int64_t kv_head = blockIdx.y / tiles, in_group = blockIdx.y % tiles * W::kRows;
  const int64_t first_head = kv_head * group + in_group;
  const int heads = static_cast<int>(min(int64_t{W::kRows}, group - in_group));
  const int length = a.lens[s], reach = tokens_of(a, s);
  int first, last;
  split_of(a, reach, split, splits.count, first, last);
  if (first >= last) return write_nothing(a, splits, s, first_head, heads, split, reach);

  char* own = shared + warp * W::kWarpBytes;
  char* staging = shared + kWarps * W::kWarpBytes;
  __shared__ float powers[W::kRows];
  constexpr int kItem = W::kItem, kValueUnit = kPacked ? 8 : 16;
  const int chunk = lane % W::kChunks;
  W w{a,
      a.tables + s * a.table_stride,
      lane,
      last,
      splits.block_shift,
      gpu::shared_address(own),
      static_cast<const char*>(a.key_cache) + kv_head * a.k_head_stride * kItem +
          (kPacked ? chunk * a.block_size : chunk) * 16,
      static_cast<const char*>(a.value_cache) + kv_head * a.v_head_stride * kItem +
          (kPacked ? 0 : chunk * 16),
      static_cast<uint32_t>(a.k_block_stride * kItem / 16),
      kPacked ? 1 : static_cast<uint32_t>(a.k_page_stride * kItem / 16),
      static_cast<uint32_t>(a.v_block_stride * kItem / kValueUnit),
      kPacked ? 0 : static_cast<uint32_t>(a.v_page_stride * kItem / 16)};
  if (a.head_size < kD) {  // what no copy fills must be zero
    for (int i = lane * 16; i < W::kWarpBytes; i += 32 * 16) {
      *reinterpret_cast<uint4*>(own + i) = uint4{0, 0, 0, 0};
    }
    __syncwarp();
  }
  constexpr int kStride = kWarps * kTile, kStages = W::kStages;
  int t = first + warp * kTile, ahead = t, stage = 0, fill = 0;
  // 16 bits a tile under way, the oldest lowest: whether each of its tokens exists.
  uint64_t known = 0;
  typename W::Row next = w.row_of(ahead);
  auto issue_next = [&](int position) {
    const uint64_t exist = __ballot_sync(~0u, next.k != kNowhere) & 0xffff;
    known |= exist << (16 * position);
    if (ahead < last) w.issue(fill, next);
    gpu::copy_async_commit();
    ahead += kStride;
    fill = fill + 1 == kStages ? 0 : fill + 1;
    next = w.row_of(ahead);
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) issue_next(i);
  W::stage_query(a, staging, powers, s, first_head, heads);
  __syncthreads();
  uint32_t q[W::kSteps][4];
  float factor[W::kSets];
  w.load_query(q, factor, staging, powers);
  const float k_scale = a.k_scale == nullptr ? 1.0f : *a.k_scale;
  float scale[W::kSets];
#pragma unroll
  for (int set = 0; set < W::kSets; ++set) {
    scale[set] = a.scale * k_scale * kLog2E * factor[set];
  }
  float o[W::kOutTiles][4];
#pragma unroll
  for (int i = 0; i < W::kOutTiles; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
  float largest[W::kSets], sum[W::kSets];
#pragma unroll
  for (int set = 0; set < W::kSets; ++set) largest[set] = -INFINITY, sum[set] = 0.0f;
  const bool plain = a.alibi == nullptr && a.sparse.vert_stride <= 1;

#pragma unroll 1
  for (; t < last; t += kStride) {
    gpu::copy_async_wait<kStages - 2>();
    __syncwarp();
    issue_next(kStages - 1);

    const uint32_t side = w.ring + stage * W::kStageBytes;
    float c[2][4];
    w.logits(c, q, side);
    const uint32_t tokens = static_cast<uint32_t>(known) & 0xffff;
    const bool whole = tokens == 0xffff;
    uint32_t p[4] = {0, 0, 0, 0};
    bool grown = false;
    float rescale[W::kSets];
#pragma unroll
    for (int set = 0; set < W::kSets; ++set) {
      float x[4];
      float top = largest[set];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = W::token_at(i / 2, 2 * quad + i % 2);
        x[i] = c[i / 2][2 * set + i % 2] * scale[set];
        if (!plain) {
          const int64_t h = first_head + row + 8 * set;
          if (a.alibi != nullptr && row + 8 * set < heads) {
            x[i] += a.alibi[h] * static_cast<float>(t + token - length + 1) * kLog2E;
          }
          if (!attends(a.sparse, h, a.heads, group, t + token, length)) x[i] = -FLT_MAX;
        }
        if (!whole && (tokens >> token & 1) == 0) x[i] = -INFINITY;
        top = fmaxf(top, x[i]);
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -INFINITY ? 0.0f : top;
      rescale[set] = gpu::exp2_approx(largest[set] - base);
      grown = grown || top > largest[set];
      largest[set] = top;
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = gpu::exp2_approx(x[i] - base);
        part += x[i];
      }
      sum[set] = sum[set] * rescale[set] + part;
      p[set] = gpu::pack<typename W::M>(x[0], x[1]);
      p[set + 2] = gpu::pack<typename W::M>(x[2], x[3]);
    }
    if (__any_sync(~0u, grown)) {
#pragma unroll
      for (int i = 0; i < W::kOutTiles; ++i) {
#pragma unroll
        for (int set = 0; set < W::kSets; ++set) {
          o[i][2 * set] *= rescale[set];
          o[i][2 * set + 1] *= rescale[set];
        }
      }
    }
    w.accumulate(o, p, side + W::kSideBytes, last - t);
    known >>= 16;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  // The warps' shares, through the memory of the ring.
  gpu::copy_async_wait<0>();
  __syncthreads();
  float* mine = reinterpret_cast<float*>(own);
  float* tops = mine + W::kRows * kD;
  float* sums = tops + W::kRows;
#pragma unroll
  for (int set = 0; set < W::kSets; ++set) {
    const int g = row + 8 * set;
    float total = sum[set];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (quad == 0) tops[g] = largest[set], sums[g] = total;
#pragma unroll
    for (int i = 0; i < W::kOutTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) mine[g * kD + W::d_at(i, quad, e)] = o[i][2 * set + e];
    }
  }
  __syncthreads();
  const float v_scale = a.v_scale == nullptr ? 1.0f : *a.v_scale;
  const int d_size = static_cast<int>(a.head_size);
  for (int i = threadIdx.x; i < heads * d_size; i += kThreads) {
    const int g = i / d_size, d = i - g * d_size;
    float top = -INFINITY, value = 0.0f, total = 0.0f;
    const float* shares = reinterpret_cast<const float*>(shared);
    constexpr int kWarpFloats = W::kWarpBytes / 4;
#pragma unroll
    for (int j = 0; j < kWarps; ++j) top = fmaxf(top, shares[j * kWarpFloats + W::kRows * kD + g]);
#pragma unroll
    for (int j = 0; j < kWarps; ++j) {
      const float* share = shares + j * kWarpFloats;
      const float own_top = share[W::kRows * kD + g];
      const float weight = own_top == -INFINITY ? 0.0f : exp2f(own_top - top);
      value += share[g * kD + d] * weight;
      total += share[W::kRows * kD + W::kRows + g] * weight;
    }
    write_result(a, splits, s, first_head + g, split, d, value * v_scale, top, total);
  }
}

template <class T, KvFormat kFormat, int kD, bool kPacked, bool kWide>
void launch_decode(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream) {
  using W = Decode<T, kFormat, kD, kPacked, kWide>;
  auto kernel = decode<T, kFormat, kD, kPacked, kWide>;
  static const gpu::Error configured = GPU_NAME(FuncSetAttribute)(
      kernel, GPU_NAME(FuncAttributeMaxDynamicSharedMemorySize), W::kSharedBytes);
  GPU_CHECK(configured);
  const int64_t group = a.heads / a.kv_heads;
  const dim3 grid(static_cast<unsigned>(splits.count),
                  static_cast<unsigned>(a.kv_heads * gpu::ceil_div(group, W::kRows)),
                  static_cast<unsigned>(a.sequences));
  kernel<<<grid, kThreads, W::kSharedBytes, stream>>>(a, splits);
}

// The instantiations, by layout: each in a source of its own.
void decode_flash(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream);
void decode_packed(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream);

}  // namespace attention
