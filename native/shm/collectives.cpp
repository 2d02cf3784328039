// all_gather, gather, reduce_scatter, broadcast and barrier. Each moves its data through the slots
// in chunks; a rank fills the next chunk's slot before it reads the peers' of this one.
#include "shm/collectives.h"

#include <algorithm>

#include "shm/reduce.h"
#include "shm/rows.h"

namespace shm {
namespace {

size_t chunk_bytes(const Team& team, const Lane& lane) {
  return std::min(team.tuning().chunk_bytes, lane.slot_bytes());
}

size_t round_down(size_t value, size_t unit) { return value / unit * unit; }

// Chunks of a lane's part of a message, [begin, end) in bytes, in the order of its steps.
struct Chunks {
  size_t begin;
  size_t end;
  size_t chunk;
  size_t count() const { return (end - begin + chunk - 1) / chunk; }
  size_t start(size_t c) const { return begin + c * chunk; }
  size_t length(size_t c) const { return std::min(chunk, end - start(c)); }
};

// fill(c, epoch) then publish, one chunk ahead of drain(c, epoch).
template <typename Fill, typename Drain>
void pipeline(Lane& lane, size_t count, Fill fill, Drain drain) {
  const auto put = [&](size_t c) {
    const uint32_t epoch = lane.next_step();
    fill(c, epoch);
    lane.publish(epoch);
    return epoch;
  };
  uint32_t epoch = put(0);
  for (size_t c = 0; c < count; ++c) {
    const uint32_t next = c + 1 < count ? put(c + 1) : 0;
    drain(c, epoch);
    epoch = next;
  }
}

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

void reduce_scatter(Team& team, DType dtype, const void* inp, void* out, size_t elements,
                    size_t inner) {
  if (elements == 0) return;
  const size_t size = sum_element_size(dtype);
  const Call call(team, {Op::kReduceScatter, dtype, 0, elements * size});
  const int w = team.world_size();
  const int rank = team.rank();
  team.on_lanes(elements, size, [&](Lane& lane, size_t first, size_t last) {
    const size_t chunk = round_down(chunk_bytes(team, lane) / (w - 1), 64);
    const Chunks chunks{first * size, last * size, std::max(chunk, size_t{64})};
    // Where in p's slot the contribution to the part of q lies: p's own part is left out.
    const auto offset = [&](int p, int q) { return (q - (q > p)) * chunks.chunk; };
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
                  sum(dtype, to + from, nullptr, sources, w, bytes / size);
                });
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
  const Call call(team, {Op::kBarrier, DType::kU8, 0, 0});
  Lane& lane = team.lane();
  const uint32_t epoch = lane.next_step();
  lane.publish(epoch);
  lane.wait_all(epoch);
}

}  // namespace shm
