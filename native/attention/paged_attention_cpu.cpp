// Decode attention on the CPU. A task is one sequence, one KV head and one partition of 512 tokens:
// its keys and values are converted to fp32 once, tile by tile, for all query heads of the KV head,
// with an online softmax. Partitions depend on the lengths alone and merge in order, so the number
// of threads changes no bit.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "attention/attention.h"
#include "prim/cpu_dispatch.h"
#include "prim/cpu_floats.h"
#include "prim/cpu_math.h"
#include "prim/cpu_parallel.h"

namespace attention {
namespace {

using cpu::from_float;
using cpu::to_float;
using cpu::vectorised;

constexpr int64_t kPartition = 512, kTile = 32, kLanes = 32;
constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

template <class T>
VECTORISED void to_floats(float* __restrict out, const T* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

template <class T>
VECTORISED void from_floats(T* __restrict out, const float* __restrict x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(x[i] * factor);
}

// Codes dequantized into T, then widened.
template <class T, cpu::Fp8 kFormat>
VECTORISED void codes_to_floats(float* __restrict out, const uint8_t* __restrict codes, int64_t n,
                                float scale) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = to_float(from_float<T>(cpu::from_fp8<kFormat>(codes[i]) * scale));
  }
}

// logits[t] = scale * dot(q, k[t]) for one query head.
VECTORISED void dot_tile(float* __restrict logits, const float* __restrict q,
                         const float* __restrict k, int64_t tokens, int64_t d, float scale) {
  for (int64_t t = 0; t < tokens; ++t, k += d) {
    float lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
      for (int64_t j = 0; j < kLanes; ++j) lane[j] += q[i + j] * k[i + j];
    }
    for (int64_t j = 0; i + j < d; ++j) lane[j] += q[i + j] * k[i + j];
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
    }
    logits[t] = lane[0] * scale;
  }
}

// p[t] = e^(p[t] - largest), the values then rounded to T; returns the sum before rounding.
template <class T>
VECTORISED float exponentials(float* __restrict p, int64_t tokens, float largest) {
  for (int64_t t = 0; t < tokens; ++t) p[t] = cpu::exp(p[t] - largest);
  float sum = 0.0f;
  for (int64_t t = 0; t < tokens; ++t) sum += p[t];
  for (int64_t t = 0; t < tokens; ++t) p[t] = to_float(from_float<T>(p[t]));
  return sum;
}

// acc = acc * rescale + sum_t p[t] v[t].
VECTORISED void accumulate_tile(float* __restrict acc, const float* __restrict p,
                                const float* __restrict v, int64_t tokens, int64_t d,
                                float rescale) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    float lane[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) lane[j] = acc[i + j] * rescale;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t j = 0; j < kLanes; ++j) lane[j] += p[t] * v[t * d + i + j];
    }
    for (int64_t j = 0; j < kLanes; ++j) acc[i + j] = lane[j];
  }
  for (; i < d; ++i) {
    float sum = acc[i] * rescale;
    for (int64_t t = 0; t < tokens; ++t) sum += p[t] * v[t * d + i];
    acc[i] = sum;
  }
}

VECTORISED void add_scaled(float* __restrict acc, const float* __restrict x, int64_t n, float w) {
  for (int64_t i = 0; i < n; ++i) acc[i] += x[i] * w;
}

// One side of the cache: n items at `at`, as floats.
template <class T>
void load(const PagedAttentionArgs& a, float* out, const void* cache, int64_t at, int64_t n,
          const float* scale) {
  const float s = scale == nullptr ? 1.0f : *scale;
  switch (a.format) {
    case KvFormat::kCopy:
      return vectorised<to_floats<T>>(out, static_cast<const T*>(cache) + at, n);
    case KvFormat::kE4M3:
      return vectorised<codes_to_floats<T, cpu::Fp8::kE4M3>>(
          out, static_cast<const uint8_t*>(cache) + at, n, s);
    case KvFormat::kE5M2:
      return vectorised<codes_to_floats<T, cpu::Fp8::kE5M2>>(
          out, static_cast<const uint8_t*>(cache) + at, n, s);
  }
}

// Tokens [first, first + n) of one block as rows [n, D] of keys and values.
template <class T>
void load_block(const PagedAttentionArgs& a, int64_t block, int64_t head, int64_t first, int64_t n,
                float* keys, float* values, std::vector<float>& packed) {
  const int64_t d = a.head_size;
  if (!a.packed) {
    for (int64_t t = 0; t < n; ++t) {
      load<T>(a, keys + t * d, a.key_cache,
              block * a.k_block_stride + (first + t) * a.k_page_stride + head * a.k_head_stride, d,
              a.k_scale);
      load<T>(a, values + t * d, a.value_cache,
              block * a.v_block_stride + (first + t) * a.v_page_stride + head * a.v_head_stride, d,
              a.v_scale);
    }
    return;
  }
  packed.resize(d * a.block_size);
  load<T>(a, packed.data(), a.key_cache, block * a.k_block_stride + head * a.k_head_stride,
          d * a.block_size, a.k_scale);
  for (int64_t c = 0; c < d / a.x; ++c) {
    const float* chunk = packed.data() + (c * a.block_size + first) * a.x;
    for (int64_t t = 0; t < n; ++t) {
      std::memcpy(keys + t * d + c * a.x, chunk + t * a.x, a.x * sizeof(float));
    }
  }
  load<T>(a, packed.data(), a.value_cache, block * a.v_block_stride + head * a.v_head_stride,
          d * a.block_size, a.v_scale);
  for (int64_t i = 0; i < d; ++i) {
    for (int64_t t = 0; t < n; ++t) values[t * d + i] = packed[i * a.block_size + first + t];
  }
}

struct Scratch {
  std::vector<float> query, keys, values, logits, packed;
};

// Partial result of the query heads of one KV head: out [group, D] not normalized, max and sum.
struct Partial {
  float *acc, *largest, *sum;
};

template <class T>
void attend(const PagedAttentionArgs& a, int64_t s, int64_t kv_head, int64_t first, int64_t last,
            const Partial& result) {
  const int64_t group = a.heads / a.kv_heads, d = a.head_size, n = a.lens[s];
  thread_local Scratch scratch;
  scratch.query.resize(group * d);
  scratch.keys.resize(kTile * d);
  scratch.values.resize(kTile * d);
  scratch.logits.resize(kTile);
  for (int64_t g = 0; g < group; ++g) {
    vectorised<to_floats<T>>(scratch.query.data() + g * d,
                             static_cast<const T*>(a.query) + s * a.query_stride +
                                 (kv_head * group + g) * a.query_head_stride,
                             d);
  }
  std::fill_n(result.acc, group * d, 0.0f);
  std::fill_n(result.largest, group, kMinusInf);
  std::fill_n(result.sum, group, 0.0f);
  int64_t position[kTile];  // of each row of the tile: blocks outside the cache leave none
  for (int64_t t = first; t < last;) {
    int64_t rows = 0;
    while (t < last && rows < kTile) {
      const int64_t off = t % a.block_size;
      const int64_t run = std::min({a.block_size - off, last - t, kTile - rows});
      const int64_t block = a.tables[s * a.table_stride + t / a.block_size];
      if (block >= 0 && block < a.num_blocks) {
        load_block<T>(a, block, kv_head, off, run, scratch.keys.data() + rows * d,
                      scratch.values.data() + rows * d, scratch.packed);
        for (int64_t i = 0; i < run; ++i) position[rows + i] = t + i;
        rows += run;
      }
      t += run;
    }
    if (rows == 0) continue;
    float* logits = scratch.logits.data();
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = kv_head * group + g;
      vectorised<dot_tile>(logits, scratch.query.data() + g * d, scratch.keys.data(), rows, d,
                           a.scale);
      if (a.alibi != nullptr) {
        for (int64_t i = 0; i < rows; ++i) {
          logits[i] += a.alibi[h] * static_cast<float>(position[i] - n + 1);
        }
      }
      if (a.sparse.vert_stride > 1) {
        for (int64_t i = 0; i < rows; ++i) {
          if (!attends(a.sparse, h, a.heads, group, position[i], n)) logits[i] = -FLT_MAX;
        }
      }
      const float before = result.largest[g];
      const float largest = std::max(before, *std::max_element(logits, logits + rows));
      const float rescale = before == kMinusInf ? 0.0f : std::exp(before - largest);
      const float sum = vectorised<exponentials<T>>(logits, rows, largest);
      result.largest[g] = largest;
      result.sum[g] = result.sum[g] * rescale + sum;
      vectorised<accumulate_tile>(result.acc + g * d, logits, scratch.values.data(), rows, d,
                                  rescale);
    }
  }
}

// Tokens of a sequence that its table can name.
int64_t tokens_of(const PagedAttentionArgs& a, int64_t s) {
  const int64_t reach = std::min(a.table_width * a.block_size, a.longest);
  return std::clamp<int64_t>(a.lens[s], 0, reach);
}

template <class T>
void write(const PagedAttentionArgs& a, int64_t s, int64_t h, const float* acc, float factor) {
  vectorised<from_floats<T>>(static_cast<T*>(a.out) + s * a.out_stride + h * a.out_head_stride, acc,
                             a.head_size, factor);
}

// The partitions of one query head, merged in order.
template <class T>
void merge(const PagedAttentionArgs& a, int64_t s, int64_t h, int64_t parts, const float* acc,
           const float* largest, const float* sum, int64_t stride) {
  float top = kMinusInf, total = 0.0f;
  for (int64_t j = 0; j < parts; ++j) top = std::max(top, largest[j * stride]);
  thread_local std::vector<float> merged;
  merged.assign(a.head_size, 0.0f);
  for (int64_t j = 0; j < parts && top != kMinusInf; ++j) {
    const float weight = std::exp(largest[j * stride] - top);
    total += sum[j * stride] * weight;
    vectorised<add_scaled>(merged.data(), acc + j * stride * a.head_size, a.head_size, weight);
  }
  write<T>(a, s, h, merged.data(), total > 0.0f ? 1.0f / (total + a.epsilon) : 0.0f);
  if (a.lse != nullptr) {
    a.lse[h * a.lse_head_stride + s * a.lse_sequence_stride] =
        total > 0.0f ? top + std::log(total) : kMinusInf;
  }
}

// paged_attention_v2: each partition normalized, rounded and written, then merged from there.
template <class T>
void write_partition(const PagedAttentionArgs& a, int64_t s, int64_t h, int64_t j, const float* acc,
                     float largest, float sum) {
  const int64_t at = (s * a.heads + h) * a.partitions + j;
  vectorised<from_floats<T>>(static_cast<T*>(a.tmp_out) + at * a.head_size, acc, a.head_size,
                             1.0f / (sum + a.epsilon));
  a.max_logits[at] = largest;
  a.exp_sums[at] = sum;
}

template <class T>
void merge_partitions(const PagedAttentionArgs& a, int64_t s, int64_t h, int64_t parts) {
  const int64_t at = (s * a.heads + h) * a.partitions;
  const T* tmp = static_cast<const T*>(a.tmp_out) + at * a.head_size;
  if (parts == 1) {
    std::memcpy(static_cast<T*>(a.out) + s * a.out_stride + h * a.out_head_stride, tmp,
                a.head_size * sizeof(T));
    return;
  }
  const float top = *std::max_element(a.max_logits + at, a.max_logits + at + parts);
  thread_local std::vector<float> merged, row;
  merged.assign(a.head_size, 0.0f);
  row.resize(a.head_size);
  float total = 0.0f;
  for (int64_t j = 0; j < parts && top != kMinusInf; ++j) {
    const float weight = a.exp_sums[at + j] * std::exp(a.max_logits[at + j] - top);
    total += weight;
    vectorised<to_floats<T>>(row.data(), tmp + j * a.head_size, a.head_size);
    vectorised<add_scaled>(merged.data(), row.data(), a.head_size, weight);
  }
  write<T>(a, s, h, merged.data(), 1.0f / (total + a.epsilon));
}

template <class T>
void run(const PagedAttentionArgs& a) {
  const int64_t group = a.heads / a.kv_heads, d = a.head_size;
  int64_t longest = 0;
  for (int64_t s = 0; s < a.sequences; ++s) longest = std::max(longest, tokens_of(a, s));
  const int64_t parts = std::max<int64_t>(1, (longest + kPartition - 1) / kPartition);
  // [S, Hkv, parts, group] partial results.
  const int64_t tasks = a.sequences * a.kv_heads * parts;
  std::vector<float> acc(tasks * group * d), largest(tasks * group), sum(tasks * group);
  const int64_t cost = std::min(longest, kPartition) * d * group * 4;
  cpu::parallel_for(tasks, cost, [&](int64_t task) {
    const int64_t j = task % parts, kv_head = task / parts % a.kv_heads;
    const int64_t s = task / parts / a.kv_heads;
    const int64_t first = j * kPartition, last = std::min(tokens_of(a, s), first + kPartition);
    if (first >= last) return;
    const int64_t at = task * group;
    attend<T>(a, s, kv_head, first, last,
              {acc.data() + at * d, largest.data() + at, sum.data() + at});
    if (a.tmp_out == nullptr) return;
    for (int64_t g = 0; g < group; ++g) {
      write_partition<T>(a, s, kv_head * group + g, j, acc.data() + (at + g) * d, largest[at + g],
                         sum[at + g]);
    }
  });
  cpu::parallel_for(a.sequences * a.heads, parts * d * 4, [&](int64_t i) {
    const int64_t s = i / a.heads, h = i % a.heads;
    const int64_t own = (tokens_of(a, s) + kPartition - 1) / kPartition;
    const int64_t at = (s * a.kv_heads + h / group) * parts * group + h % group;
    if (a.tmp_out != nullptr && own > 0) return merge_partitions<T>(a, s, h, own);
    merge<T>(a, s, h, own, acc.data() + at * d, largest.data() + at, sum.data() + at, group);
  });
}

}  // namespace

void paged_attention(const PagedAttentionArgs& a, Stream /*stream*/) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run<float>(a);
    case DType::kFloat16:
      return run<cpu::Half>(a);
    default:
      return run<cpu::BFloat16>(a);
  }
}

int64_t paged_attention_scratch(const PagedAttentionArgs& /*args*/) { return 0; }

}  // namespace attention
