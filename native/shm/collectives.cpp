// all_gather, gather, reduce, reduce_scatter, scatter, broadcast and barrier. Each moves its data
// through the slots in chunks; a rank fills the next chunk's slot before it reads the peers' of
// this one.
#include "shm/collectives.h"

#include <algorithm>

#include "shm/pipeline.h"
#include "shm/reduce.h"
#include "shm/rows.h"

namespace shm {
namespace {

Rows<std::byte> part(void* tensor, int rank, int w, size_t inner) {
  return {static_cast<std::byte*>(tensor) + rank * inner, inner, w * inner};
}
Rows<const std::byte> part(const void* tensor, int rank, int w, size_t inner) {
  return {static_cast<const std::byte*>(tensor) + rank * inner, inner, w * inner};
}

// all_gather, and gather where only the root drains.
void gather_parts(Team& team, const void* inp, void* out, size_t bytes, size_t inner, bool drains,
                  bool fills) {
  const int w = team.world_size();
  const int rank = team.rank();
  const auto* mine = static_cast<const std::byte*>(inp);
  team.on_lanes(bytes, 1, [&](Lane& lane, size_t begin, size_t end) {
    const Chunks chunks{begin, end, chunk_bytes(team, lane)};
    const auto fill = [&](size_t c, uint32_t epoch) {
      if (fills) std::memcpy(lane.my_slot(epoch), mine + chunks.start(c), chunks.length(c));
    };
    const auto drain = [&](size_t c, uint32_t epoch) {
      if (!drains) return;
      const auto put = [&](int p, const std::byte* from) {
        copy_to(part(out, p, w, inner), chunks.start(c), chunks.length(c), from);
      };
      put(rank, mine + chunks.start(c));  // while the peers finish
      for (int i = 1; i < w; ++i) {
        const int p = (rank + i) % w;
        lane.wait(p, epoch);
        put(p, lane.slot(p, epoch));
      }
    };
    pipeline(lane, chunks.count(), fill, drain);
  });
}

}  // namespace

void all_gather(Team& team, DType dtype, const void* inp, void* out, size_t bytes,
                size_t inner_bytes) {
  if (bytes == 0) return;
  const Call call(team, {Op::kAllGather, dtype, 0, bytes});
  gather_parts(team, inp, out, bytes, inner_bytes, true, true);
}

void gather(Team& team, DType dtype, const void* inp, void* out, size_t bytes, size_t inner_bytes,
            int root) {
  if (bytes == 0) return;
  const Call call(team, {Op::kGather, dtype, root, bytes});
  const bool is_root = team.rank() == root;
  gather_parts(team, inp, out, bytes, inner_bytes, is_root, !is_root);
}

void reduce(Team& team, DType dtype, const void* inp, void* out, size_t elements, int root,
            Reduction reduction) {
  if (elements == 0) return;
  const size_t size = reduced_size(reduction, dtype);
  const Call call(team, {Op::kReduce, dtype, root, elements * size, reduction});
  const int w = team.world_size();
  const bool is_root = team.rank() == root;
  const auto* mine = static_cast<const std::byte*>(inp);
  team.on_lanes(elements, size, [&](Lane& lane, size_t first, size_t last) {
    const Chunks chunks{first * size, last * size,
                        prim::round_down(chunk_bytes(team, lane), prim::kLineBytes)};
    const auto fill = [&](size_t c, uint32_t epoch) {
      if (!is_root) std::memcpy(lane.my_slot(epoch), mine + chunks.start(c), chunks.length(c));
    };
    const auto drain = [&](size_t c, uint32_t epoch) {
      if (!is_root) return;
      lane.wait_all(epoch);
      const void* sources[kMaxRanks];
      for (int p = 0; p < w; ++p) {
        sources[p] = p == root ? mine + chunks.start(c) : lane.slot(p, epoch);
      }
      shm::reduce(reduction, dtype, static_cast<std::byte*>(out) + chunks.start(c), nullptr,
                  sources, w, chunks.length(c) / size);
    };
    pipeline(lane, chunks.count(), fill, drain);
  });
}

void reduce_scatter(Team& team, DType dtype, const void* inp, void* out, size_t elements,
                    size_t inner, Reduction reduction) {
  if (elements == 0) return;
  const size_t size = reduced_size(reduction, dtype);
  const Call call(team, {Op::kReduceScatter, dtype, 0, elements * size, reduction});
  const int w = team.world_size();
  const int rank = team.rank();
  team.on_lanes(elements, size, [&](Lane& lane, size_t first, size_t last) {
    const Chunks chunks{first * size, last * size, part_bytes(team, lane)};
    const auto offset = [&](int p, int q) { return part_offset(p, q, chunks.chunk); };
    const auto fill = [&](size_t c, uint32_t epoch) {
      for (int q = 0; q < w; ++q) {
        if (q == rank) continue;
        copy_from(part(inp, q, w, inner * size), chunks.start(c), chunks.length(c),
                  lane.my_slot(epoch) + offset(rank, q));
      }
    };
    const auto drain = [&](size_t c, uint32_t epoch) {
      lane.wait_all(epoch);
      auto* to = static_cast<std::byte*>(out) + chunks.start(c);
      part(inp, rank, w, inner * size)
          .runs(chunks.start(c), chunks.length(c),
                [&](const std::byte* at, size_t from, size_t bytes) {
                  const void* sources[kMaxRanks];
                  for (int p = 0; p < w; ++p) {
                    sources[p] = p == rank ? at : lane.slot(p, epoch) + offset(p, rank) + from;
                  }
                  shm::reduce(reduction, dtype, to + from, nullptr, sources, w, bytes / size);
                });
    };
    pipeline(lane, chunks.count(), fill, drain);
  });
}

void scatter(Team& team, DType dtype, const void* inp, void* out, size_t bytes, int root) {
  if (bytes == 0) return;
  const Call call(team, {Op::kScatter, dtype, root, bytes});
  const int w = team.world_size();
  const int rank = team.rank();
  const auto* all = static_cast<const std::byte*>(inp);
  auto* mine = static_cast<std::byte*>(out);
  team.on_lanes(bytes, 1, [&](Lane& lane, size_t begin, size_t end) {
    const Chunks chunks{begin, end, part_bytes(team, lane)};
    const auto offset = [&](int q) { return part_offset(root, q, chunks.chunk); };
    const auto fill = [&](size_t c, uint32_t epoch) {
      for (int q = 0; rank == root && q < w; ++q) {
        const std::byte* from = all + q * bytes + chunks.start(c);
        std::byte* to = q == root ? mine + chunks.start(c) : lane.my_slot(epoch) + offset(q);
        std::memcpy(to, from, chunks.length(c));
      }
    };
    const auto drain = [&](size_t c, uint32_t epoch) {
      if (rank == root) return;
      lane.wait(root, epoch);
      std::memcpy(mine + chunks.start(c), lane.slot(root, epoch) + offset(rank), chunks.length(c));
    };
    pipeline(lane, chunks.count(), fill, drain);
  });
}

void broadcast(Team& team, DType dtype, void* data, size_t bytes, int root) {
  if (bytes == 0) return;
  const Call call(team, {Op::kBroadcast, dtype, root, bytes});
  const bool is_root = team.rank() == root;
  auto* all = static_cast<std::byte*>(data);
  team.on_lanes(bytes, 1, [&](Lane& lane, size_t begin, size_t end) {
    const Chunks chunks{begin, end, chunk_bytes(team, lane)};
    const auto fill = [&](size_t c, uint32_t epoch) {
      if (is_root) std::memcpy(lane.my_slot(epoch), all + chunks.start(c), chunks.length(c));
    };
    const auto drain = [&](size_t c, uint32_t epoch) {
      if (is_root) return;
      lane.wait(root, epoch);
      std::memcpy(all + chunks.start(c), lane.slot(root, epoch), chunks.length(c));
    };
    pipeline(lane, chunks.count(), fill, drain);
  });
}

void barrier(Team& team) {
  const Call call(team, {Op::kBarrier, DType::kUInt8, 0, 0});
  Lane& lane = team.lane();
  const uint32_t epoch = lane.next_step();
  lane.publish(epoch);
  lane.wait_all(epoch);
}

}  // namespace shm
