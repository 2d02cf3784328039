// Gathers out of the paged cache on the CPU: a task is one row of the dense tensor.
#include <algorithm>

#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {
namespace {

struct Source {
  int64_t block = -1, off = 0;  // block < 0: the row is left alone
};

int64_t end_of(const GatherMap& m, int64_t b) {
  return m.open_end && b == m.sequences - 1 ? m.rows : m.cu[b + 1];
}

Source find(const GatherMap& m, int64_t row) {
  int64_t b;
  if (m.seq_of != nullptr) {
    b = m.seq_of[row];
  } else {  // the last sequence that starts at or before the row
    b = std::upper_bound(m.cu, m.cu + m.sequences, static_cast<int32_t>(row)) - m.cu - 1;
  }
  if (b < 0 || b >= m.sequences || row < m.cu[b] || row >= end_of(m, b)) return {};
  const int64_t p = row - m.cu[b] + (m.starts == nullptr ? 0 : m.starts[b]);
  if (p < 0 || p / m.block_size >= m.table_width) return {};
  const int64_t block = m.table[b * m.table_stride + p / m.block_size];
  if (block < 0 || block >= m.num_blocks) return {};
  return {block, p % m.block_size};
}

void upconvert(const uint8_t* entry, cpu::BFloat16* row) {
  for (int64_t tile = 0; tile < kDsMlaLatent / kDsMlaTile; ++tile) {
    float scale;
    std::memcpy(&scale, entry + kDsMlaScales + tile * sizeof(float), sizeof(float));
    load_run(row + tile * kDsMlaTile, entry + tile * kDsMlaTile, kDsMlaTile, KvFormat::kE4M3,
             scale);
  }
  std::memcpy(row + kDsMlaLatent, entry + kDsMlaRope, kDsMlaEntry - kDsMlaRope);
}

}  // namespace

void gather_cache(const GatherArgs& a, Stream /*stream*/) {
  const char* src = static_cast<const char*>(a.src);
  const auto copy_run = PICK_ISA(copy_run);
  cpu::parallel_for(a.map.rows, 2 * a.entry * a.item_bytes, [&](int64_t row) {
    const Source from = find(a.map, row);
    if (from.block < 0) return;
    const char* entry =
        src + a.item_bytes * (from.block * a.block_stride + from.off * a.entry_stride);
    if (a.format == KvFormat::kCopy) {
      copy_run(static_cast<char*>(a.dst) + row * a.dst_stride * a.item_bytes, entry,
               a.entry * a.item_bytes);
      return;
    }
    with_float(a.dtype, [&](auto type) {
      using T = decltype(type);
      load_run(static_cast<T*>(a.dst) + row * a.dst_stride, reinterpret_cast<const uint8_t*>(entry),
               a.entry, a.format, *a.scale);
    });
  });
}

void gather_and_upconvert_ds_mla(const GatherUpconvertArgs& a, Stream /*stream*/) {
  cpu::parallel_for(a.map.rows, 2 * kDsMlaEntry, [&](int64_t row) {
    const Source from = find(a.map, row);
    if (from.block < 0) return;
    const uint8_t* entry = a.src + from.block * a.block_stride + from.off * a.entry_stride;
    if (a.host != nullptr) {
      const int64_t id = from.block * a.map.block_size + from.off;
      const int64_t device_row = a.device_rows[id], host_row = a.host_rows[id];
      if (device_row >= a.src_blocks * a.map.block_size) return;
      if (device_row < 0 && (host_row < 0 || host_row >= a.host_count)) return;
      entry = device_row < 0 ? a.host + host_row * kDsMlaEntry
                             : a.src + device_row / a.map.block_size * a.block_stride +
                                   device_row % a.map.block_size * a.entry_stride;
    }
    upconvert(entry, static_cast<cpu::BFloat16*>(a.dst) + row * a.dst_stride);
  });
}

void gather_indexer(const IndexerGatherArgs& a, Stream /*stream*/) {
  cpu::parallel_for(a.map.rows, 2 * (a.head_size + a.scale_bytes), [&](int64_t row) {
    const Source from = find(a.map, row);
    if (from.block < 0) return;
    const uint8_t* block = a.cache + from.block * a.block_stride;
    std::memcpy(a.dst_k + row * a.head_size, block + from.off * a.head_size, a.head_size);
    std::memcpy(a.dst_scale + row * a.scale_bytes,
                block + a.map.block_size * a.head_size + from.off * a.scale_bytes, a.scale_bytes);
  });
}

}  // namespace kvcache
