// The rows of a gather on the GPU. A warp takes a few rows of the dense tensor: a lane per row
// finds where its entry lies, then all lanes move the entries. Warps need nothing of each other, so
// some look up while others move.
#pragma once

#include "kvcache/cache.h"
#include "prim/gpu_floats.h"
#include "prim/gpu_shuffle.h"

namespace kvcache {

inline constexpr int kGatherThreads = 128;

// Reads a map; kEarly: before dependency_wait(), while the predecessor may be writing it. That is
// good enough to tell what to prefetch, and must leave no stale line in the L1.
template <bool kEarly>
__device__ int32_t read(const int32_t* map) {
  if constexpr (kEarly) return gpu::ld_relaxed_gpu(map);
  return *map;
}

// The last sequence that starts at or before `row`, of those from `low` on; -1 if there is none.
__device__ inline int64_t last_start(const GatherMap& m, int64_t row, int64_t low) {
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

// The same of the rows of a warp, one per lane, from `first` or from `far` on. With up to 32
// sequences each lane loads the start of one: one load to wait for instead of one for each halving.
// Early there is no search: some rows are not found then.
template <bool kEarly>
__device__ int64_t sequence_of(const GatherMap& m, int64_t first, int64_t far, int64_t row) {
  if (m.sequences > 32) return kEarly ? -1 : last_start(m, row, 0);
  const int lane = threadIdx.x % 32;
  const int64_t start = lane < m.sequences ? read<kEarly>(m.cu + lane) : INT64_MAX;
  const uint32_t before_first = gpu::ballot(start <= first);
  const uint32_t before_far = gpu::ballot(start <= far);
  const int64_t b = __popc(row < far ? before_first : before_far) - 1;
  if (kEarly) return b;
  const int64_t next = gpu::shuffle(start, (b + 1) % 32);
  return b + 1 >= m.sequences || row < next ? b : last_start(m, row, b + 1);
}

// Where the entry of a row lies; a negative block: nowhere, leave the row alone.
struct Entry {
  int64_t block, offset;
};

template <bool kEarly>
__device__ Entry find(const GatherMap& m, const gpu::FastDivisor& block_size, int64_t b,
                      int64_t row) {
  constexpr Entry kNowhere = {-1, 0};
  if (b < 0 || b >= m.sequences) return kNowhere;
  const int64_t first = read<kEarly>(m.cu + b);
  const int64_t end = m.open_end && b == m.sequences - 1 ? m.rows : read<kEarly>(m.cu + b + 1);
  if (row < first || row >= end) return kNowhere;
  const int64_t p = row - first + (m.starts == nullptr ? 0 : read<kEarly>(m.starts + b));
  if (p < 0) return kNowhere;
  const auto place = gpu::place_of(static_cast<uint64_t>(p), block_size);
  const int64_t logical = static_cast<int64_t>(place.block);
  if (logical >= m.table_width) return kNowhere;
  const int64_t block = read<kEarly>(m.table + b * m.table_stride + logical);
  if (block >= m.num_blocks) return kNowhere;
  return {block, static_cast<int64_t>(place.offset)};
}

// Entries that come into the L2 before their blocks move them.
struct Ahead {
  uint32_t bytes;   // of an entry, a multiple of 16 at such an address
  uint32_t blocks;  // 0: none
};

// The rows [first, first + kRows) of a warp, one per lane: `place` makes an int64 of the block and
// the offset of each, -1 stands for a row to be left alone; `address` makes an address of it.
// ask_early(), dependency_wait() and find_own() in this order stand for begin_overlapped(). kGiven:
// the map says of each row which sequence it belongs to.
template <int kRows, bool kGiven>
struct Rows {
  int64_t first;

  // Until the predecessor has ended the maps come into the L2, the table line by line.
  __device__ explicit Rows(const GatherMap& m) {
    gpu::launch_dependents();
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x) / 32;
    first = warp * kRows;
    if (threadIdx.x % 32 == 0) {
      constexpr int kLine = 32;  // entries
      if (kGiven) gpu::prefetch_early(m.seq_of + min(first, m.rows - 1));
      const int64_t table_end = (m.sequences - 1) * m.table_stride + m.table_width;
      if (warp * kLine < table_end) gpu::prefetch(m.table + warp * kLine);
      if (warp * kLine < m.sequences) gpu::prefetch(m.cu + warp * kLine);
    }
  }

  // The first blocks prefetch their rows, by what the maps hold by then.
  template <class Place, class Address>
  __device__ void ask_early(const GatherMap& m, const gpu::FastDivisor& block_size,
                            const Ahead& ahead, const Place& place, const Address& address) const {
    if (blockIdx.x >= ahead.blocks) return;
    const int64_t own = find_rows<true>(m, block_size, 0, place);
    if (own >= 0) gpu::prefetch_range(address(own), ahead.bytes);
  }

  // As many further lanes look up rows of a later block meanwhile and prefetch them.
  template <class Place, class Address>
  __device__ int64_t find_own(const GatherMap& m, const gpu::FastDivisor& block_size,
                              const Ahead& ahead, const Place& place,
                              const Address& address) const {
    const int64_t own = find_rows<false>(m, block_size, ahead.blocks, place);
    if (ahead.blocks > 0 && threadIdx.x % 32 >= kRows && own >= 0) {
      gpu::prefetch_range(address(own), ahead.bytes);
    }
    return own;
  }

 private:
  // Own rows in the first lanes, those of `blocks` blocks later in the next.
  template <bool kEarly, class Place>
  __device__ int64_t find_rows(const GatherMap& m, const gpu::FastDivisor& block_size,
                               uint32_t blocks, const Place& place) const {
    static_assert(2 * kRows <= 32);
    const int lane = threadIdx.x % 32;
    const int64_t far =
        blocks == 0 ? INT64_MAX : first + int64_t{blocks} * (kGatherThreads / 32) * kRows;
    const int64_t row = lane < kRows || blocks == 0 ? first + lane : far + lane - kRows;
    const bool wanted = lane < (blocks == 0 ? kRows : 2 * kRows) && row < m.rows;
    int64_t b = -1;
    if constexpr (kGiven) {
      if (wanted) b = read<kEarly>(m.seq_of + row);
    } else {
      b = sequence_of<kEarly>(m, first, far, row);
    }
    if (!wanted) return -1;
    const Entry entry = find<kEarly>(m, block_size, b, row);
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
      at[u] = gpu::shuffle(own, row[u] % 32);
      if (i >= total) at[u] = -1;
      if (at[u] >= 0) load(u, row[u], step[u], at[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at[u] >= 0) store(u, row[u], step[u]);
    }
  }
}

}  // namespace kvcache
