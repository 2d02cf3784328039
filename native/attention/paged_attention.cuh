// Decode attention on tensor cores. A block takes one sequence, up to 16 query heads of one KV head
// (or up to 8 of each of two) and one split of the tokens; each of its warps streams its own tiles
// of 16 tokens of one KV head through a ring of asynchronous copies and keeps its own online
// softmax, so that the loop needs no block-wide barrier. The warps merge at the end, the splits in
// a kernel of their own.
//
// fp8 values stay fp8 in shared memory and become fp16 in registers, exactly; their scales are
// factors of the logits and of the result. The query becomes fp16 too, as a power of two times
// values of at most 1. Codes come four to a register, so the order of d inside 16 (and for the
// packed values that of the tokens) is permuted alike on both sides of a product.
#pragma once

#include "attention/splits.cuh"
#include "prim/gpu_mma.h"
#include "prim/gpu_shuffle.h"

namespace attention {

inline constexpr int kTile = 16;

// Offsets into the caches are counted in 16 bytes (packed values: 8) and fit 32 bits.
inline constexpr uint32_t kNowhere = 0xffffffffu;

// Tiles of a warp's ring: one is worked on, the others are under way. In 16 bits that makes 64 KB a
// multiprocessor on an H200; more would only wait in the memory's queues, for some blocks longer
// than for others.
constexpr int ring_stages(bool fp8, int64_t d) { return fp8 ? 4 : d > 64 ? 2 : 3; }

// kD: head size rounded up to 64, 128 or 256. kWide: more than 8 query heads a KV head. kHeads: KV
// heads per block; kWays of its warps share the tokens of each.
template <class T, KvFormat kFormat, int kD, bool kPacked, bool kWide, int kHeads>
struct Decode {
  static constexpr bool kFp8 = kFormat != KvFormat::kCopy;
  using M = std::conditional_t<kFp8, gpu::Half, T>;  // of the products
  static constexpr int kItem = kFp8 ? 1 : 2;
  static constexpr int kRowBytes = kD * kItem, kChunks = kRowBytes / 16;
  static constexpr int kSideBytes = kTile * kRowBytes;  // keys or values of a tile
  static constexpr int kStageBytes = 2 * kSideBytes;
  static constexpr int kStages = ring_stages(kFp8, kD);
  static constexpr int kWarpBytes = kStages * kStageBytes;
  static constexpr int kWays = kWarps / kHeads;
  static constexpr int kRows = kWide ? 16 : 8, kSets = kWide ? 2 : 1;
  static constexpr int kAllRows = kHeads * kRows, kQueryBytes = kAllRows * kD * 2;
  static constexpr int kSteps = kD / 16, kOutTiles = kD / 8;
  static constexpr int kSharedBytes = kWarps * kWarpBytes + kQueryBytes;
  // A warp's share in the merge: rows of kPitch floats, in different banks, then maxima and sums.
  static constexpr int kPitch = kD + 8, kTops = kRows * kPitch;
  static_assert((kTops + 2 * kRows) * 4 <= kWarpBytes, "the merge fits in the ring");

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
      const uint32_t k = gpu::shuffle(mine.k, row);
      const bool valid = k != kNowhere;
      const char* k_from = keys + static_cast<uint64_t>(valid ? k : 0) * 16;
      if (whole) gpu::copy_async<16>(k_at + chunk_at(row, c), k_from, valid);
      if constexpr (!kPacked) {
        const uint32_t v = gpu::shuffle(mine.v, row);
        const char* v_from = values + static_cast<uint64_t>(valid ? v : 0) * 16;
        if (whole) gpu::copy_async<16>(v_at + chunk_at(row, c), v_from, valid);
        if (half) {
          gpu::copy_async<8>(k_at + chunk_at(row, c), k_from, valid);
          gpu::copy_async<8>(v_at + chunk_at(row, c), v_from, valid);
        }
      }
    }
    if constexpr (kPacked) {  // 8 tokens of one d a copy
      const uint32_t v[2] = {gpu::shuffle(mine.v, 0), gpu::shuffle(mine.v, 8)};
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

  // Query head of a row of the block, counted from the block's first, or -1. heads: of a KV head.
  __device__ static int head_of(int row, int heads) {
    return row < kAllRows && row % kRows < heads ? row / kRows * heads + row % kRows : -1;
  }

  // The block's query rows into shared memory, as products take them; powers: what was taken out
  // of each. All threads call it.
  __device__ static void stage_query(const PagedAttentionArgs& a, char* staging, float* powers,
                                     int64_t s, int64_t first_head, int heads) {
    constexpr int kRowThreads = kD / 8;  // 8 elements each; 8 to 32 neighbouring lanes per row
    constexpr int kPasses = (kAllRows * kRowThreads + kThreads - 1) / kThreads;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = threadIdx.x + pass * kThreads, g = i / kRowThreads, d = i % kRowThreads * 8;
      const int head = head_of(g, heads);
      const int64_t at = s * a.query_stride + (first_head + head) * a.query_head_stride + d;
      float x[8] = {}, largest = 0.0f;
      auto read = [&](auto element) {
        using Q = decltype(element);
        const Q* from = static_cast<const Q*>(a.query) + at;
        gpu::Vec<Q, 8> v;
        if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
          gpu::load<true>(v, from);
        } else {
          gpu::load<false>(v, from);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = gpu::to_float(v.at[j]);
      };
      if (head >= 0 && d < a.head_size) {  // head sizes are multiples of 8
        a.dtype == DType::kFloat16 ? read(gpu::Half{}) : read(gpu::BFloat16{});
      }
#pragma unroll
      for (float e : x) largest = fmaxf(largest, fabsf(e));
      float taken = 1.0f;
      if constexpr (kFp8) {
#pragma unroll
        for (int offset = kRowThreads / 2; offset > 0; offset /= 2) {
          largest = fmaxf(largest, gpu::shuffle_xor(largest, offset));
        }
        if (largest > 1e-30f && largest < 1e30f) taken = gpu::power_of_two_at_least(largest);
      }
      gpu::Vec<M, 8> row;
#pragma unroll
      for (int j = 0; j < 8; ++j) row.at[j] = gpu::from_float<M>(x[j] * (1.0f / taken));
      if (g < kAllRows) {
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

template <class T, KvFormat kFormat, int kD, bool kPacked, bool kWide, int kHeads>
__global__ void __launch_bounds__(kThreads, kD > 128                     ? 1
                                            : kFormat == KvFormat::kCopy ? 2
                                                                         : 3)
    decode(const __grid_constant__ PagedAttentionArgs a, Splits splits) {
  using W = Decode<T, kFormat, kD, kPacked, kWide, kHeads>;
  // The length and the table's part, should the sequence be as long as it can: into the L2 while
  // the predecessor ends.
  gpu::launch_dependents();
  if (threadIdx.x == 0 && a.table_width > 0) {
    const int64_t guess = blockIdx.x * (a.longest / splits.count) / a.block_size;
    gpu::prefetch(a.lens + blockIdx.z);
    gpu::prefetch(a.tables + blockIdx.z * a.table_stride + min(guess, a.table_width - 1));
  }
  gpu::dependency_wait();
  extern __shared__ __align__(128) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int split = blockIdx.x;
  const int64_t s = blockIdx.z, group = a.heads / a.kv_heads;
  const int64_t tiles = (group + W::kRows - 1) / W::kRows;
  const int64_t first_kv_head = blockIdx.y / tiles * kHeads;
  const int64_t kv_head = first_kv_head + warp % kHeads;
  const int64_t in_group = blockIdx.y % tiles * W::kRows;
  const int64_t first_head = first_kv_head * group + in_group;
  const int heads = static_cast<int>(min(int64_t{W::kRows}, group - in_group));
  const int length = a.lens[s], reach = tokens_of(a, s);
  int first, last;
  split_of(a, reach, split, splits.count, first, last);
  if (first >= last) return write_nothing(a, splits, s, first_head, kHeads * heads, split);

  char* own = shared + warp * W::kWarpBytes;
  char* staging = shared + kWarps * W::kWarpBytes;
  __shared__ float powers[W::kAllRows];
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
    gpu::sync_warp();
  }
  constexpr int kStride = W::kWays * kTile, kStages = W::kStages;
  int t = first + warp / kHeads * kTile, ahead = t, stage = 0, fill = 0;
  // 16 bits per tile under way, the oldest lowest: whether each of its tokens exists.
  uint64_t known = 0;
  typename W::Row next = w.row_of(ahead);
  auto issue_next = [&](int position) {
    const uint64_t exist = gpu::ballot(next.k != kNowhere) & 0xffff;
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
  const int first_row = warp % kHeads * W::kRows;
  w.load_query(q, factor, staging + first_row * kD * 2, powers + first_row);
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
    gpu::sync_warp();
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
          const int64_t h = kv_head * group + in_group + row + 8 * set;
          if (a.alibi != nullptr && row + 8 * set < heads) {
            x[i] += a.alibi[h] * static_cast<float>(t + token - length + 1) * kLog2E;
          }
          if (!attends(a.sparse, h, a.heads, group, t + token, length)) x[i] = -FLT_MAX;
        }
        if (!whole && (tokens >> token & 1) == 0) x[i] = -INFINITY;
        top = fmaxf(top, x[i]);
      }
      top = fmaxf(top, gpu::shuffle_xor(top, 1));
      top = fmaxf(top, gpu::shuffle_xor(top, 2));
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
    if (gpu::any_lane(grown)) {
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
#pragma unroll
  for (int set = 0; set < W::kSets; ++set) {
    const int g = row + 8 * set;
    float total = sum[set];
    total += gpu::shuffle_xor(total, 1);
    total += gpu::shuffle_xor(total, 2);
    if (quad == 0) mine[W::kTops + g] = largest[set], mine[W::kTops + W::kRows + g] = total;
    float* to = mine + g * W::kPitch;
#pragma unroll
    for (int i = 0; i < W::kOutTiles; i += 2) {
      const float* even = o[i] + 2 * set;
      const float* odd = o[i + 1] + 2 * set;
      if constexpr (W::kFp8 && !kPacked) {
        *reinterpret_cast<float4*>(to + W::d_at(i, quad, 0)) =
            make_float4(even[0], odd[0], even[1], odd[1]);
      } else {
        *reinterpret_cast<float2*>(to + W::d_at(i, quad, 0)) = make_float2(even[0], even[1]);
        *reinterpret_cast<float2*>(to + W::d_at(i + 1, quad, 0)) = make_float2(odd[0], odd[1]);
      }
    }
  }
  __syncthreads();
  // A few threads per row, four elements at a time.
  constexpr int kRowThreads = kThreads / W::kAllRows, kWayFloats = kHeads * W::kWarpBytes / 4;
  const int of_all = threadIdx.x / kRowThreads, g = of_all % W::kRows;
  const int head = W::head_of(of_all, heads);
  if (head < 0) return;
  const float* shares = reinterpret_cast<const float*>(shared + of_all / W::kRows * W::kWarpBytes);
  float top = -INFINITY, total = 0.0f, weight[W::kWays];
#pragma unroll
  for (int j = 0; j < W::kWays; ++j) top = fmaxf(top, shares[j * kWayFloats + W::kTops + g]);
#pragma unroll
  for (int j = 0; j < W::kWays; ++j) {
    const float* share = shares + j * kWayFloats + W::kTops;
    weight[j] = share[g] == -INFINITY ? 0.0f : gpu::exp2_approx(share[g] - top);
    total += share[W::kRows + g] * weight[j];
  }
  const float v_scale = a.v_scale == nullptr ? 1.0f : *a.v_scale;
  for (int d = threadIdx.x % kRowThreads * 4; d < a.head_size; d += kRowThreads * 4) {
    float value[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < W::kWays; ++j) {
      const float4 x =
          *reinterpret_cast<const float4*>(shares + j * kWayFloats + g * W::kPitch + d);
      value[0] += x.x * weight[j], value[1] += x.y * weight[j];
      value[2] += x.z * weight[j], value[3] += x.w * weight[j];
    }
#pragma unroll
    for (float& x : value) x *= v_scale;
    write_result(a, splits, s, first_head + head, split, d, value, top, total);
  }
}

template <class T, KvFormat kFormat, int kD, bool kPacked, bool kWide, int kHeads = 1>
void launch_decode(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream) {
  using W = Decode<T, kFormat, kD, kPacked, kWide, kHeads>;
  auto kernel = decode<T, kFormat, kD, kPacked, kWide, kHeads>;
  static const gpu::Error configured = GPU_NAME(FuncSetAttribute)(
      kernel, GPU_NAME(FuncAttributeMaxDynamicSharedMemorySize), W::kSharedBytes);
  GPU_CHECK(configured);
  const int64_t group = a.heads / a.kv_heads;
  const dim3 grid(static_cast<unsigned>(splits.count),
                  static_cast<unsigned>(a.kv_heads / kHeads * gpu::ceil_div(group, W::kRows)),
                  static_cast<unsigned>(a.sequences));
  gpu::launch_overlapped_with({.shared_bytes = W::kSharedBytes}, "paged_attention", kernel, grid,
                              kThreads, stream, a, splits);
}

// The instantiations, by layout: each in a source of its own.
void decode_flash(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream);
void decode_packed(const PagedAttentionArgs& a, const Splits& splits, gpu::Stream stream);

}  // namespace attention
