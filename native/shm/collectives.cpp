// all_gather, gather, reduce_scatter, broadcast and barrier. Each moves its data through the slots
// in chunks; a rank fills the next chunk's slot before it reads the peers' of this one.
#include "shm/collectives.h"

#include <algorithm>

#include "shm/reduce.h"
#include "shm/rows.h"

namespace shm {
namespace {

size_t chunk_bytes(const Team& team) {
  return std::min(team.tuning().chunk_bytes, team.layout().slot_bytes);
}

size_t round_down(size_t value, size_t unit) { return value / unit * unit; }

// Chunks of a message of `bytes`, in the order of its steps.
struct Chunks {
  size_t bytes;
  size_t chunk;
  size_t count() const { return (bytes + chunk - 1) / chunk; }
  size_t start(size_t c) const { return c * chunk; }
  size_t length(size_t c) const { return std::min(chunk, bytes - start(c)); }
};

// fill(c, epoch) then publish, one chunk ahead of drain(c, epoch).
template <typename Fill, typename Drain>
void pipeline(Team& team, size_t count, Fill fill, Drain drain) {
  const auto put = [&](size_t c) {
    const uint32_t epoch = team.next_step();
    fill(c, epoch);
    team.publish(epoch);
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
  const Chunks chunks{bytes, chunk_bytes(team)};
  const auto fill = [&](size_t c, uint32_t epoch) {
    if (!fills) return;
    std::byte* slot = team.my_slot(epoch);
    const std::byte* from = mine + chunks.start(c);
    team.parallel(chunks.length(c), 1, [&](size_t begin, size_t end) {
      std::memcpy(slot + begin, from + begin, end - begin);
    });
  };
  const auto drain = [&](size_t c, uint32_t epoch) {
    if (!drains) return;
    const size_t start = chunks.start(c);
    const auto put = [&](int p, const std::byte* from) {
      const auto to = part(out, p, w, inner);
      team.parallel(chunks.length(c), 1, [&](size_t begin, size_t end) {
        copy_to(to, start + begin, end - begin, from + begin);
      });
    };
    put(rank, mine + start);  // while the peers finish
    for (int i = 1; i < w; ++i) {
      const int p = (rank + i) % w;
      team.wait(p, epoch);
      put(p, team.slot(p, epoch));
    }
  };
  pipeline(team, chunks.count(), fill, drain);
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
  const Chunks chunks{elements * size,
                      std::max(round_down(chunk_bytes(team) / (w - 1), 64), size_t{64})};
  // Where in p's slot the contribution to the part of q lies: p's own part is left out.
  const auto offset = [&](int p, int q) { return (q - (q > p)) * chunks.chunk; };
  const auto fill = [&](size_t c, uint32_t epoch) {
    for (int q = 0; q < w; ++q) {
      if (q == rank) continue;
      std::byte* to = team.my_slot(epoch) + offset(rank, q);
      const auto from = part(inp, q, w, inner * size);
      team.parallel(chunks.length(c), 1, [&](size_t begin, size_t end) {
        copy_from(from, chunks.start(c) + begin, end - begin, to + begin);
      });
    }
  };
  const auto drain = [&](size_t c, uint32_t epoch) {
    team.wait_all(epoch);
    const size_t start = chunks.start(c);
    auto* to = static_cast<std::byte*>(out) + start;
    const auto own = part(inp, rank, w, inner * size);
    team.parallel(chunks.length(c) / size, size * w, [&](size_t begin, size_t end) {
      own.runs(start + begin * size, (end - begin) * size,
               [&](const std::byte* at, size_t position, size_t bytes) {
                 const size_t from = begin * size + position;
                 const void* sources[kMaxRanks];
                 for (int p = 0; p < w; ++p) {
                   sources[p] = p == rank ? at : team.slot(p, epoch) + offset(p, rank) + from;
                 }
                 sum(dtype, to + from, nullptr, sources, w, bytes / size);
               });
    });
  };
  pipeline(team, chunks.count(), fill, drain);
}

void broadcast(Team& team, DType dtype, void* data, size_t bytes, int root) {
  if (bytes == 0) return;
  const Call call(team, {Op::kBroadcast, dtype, root, bytes});
  const bool is_root = team.rank() == root;
  const Chunks chunks{bytes, chunk_bytes(team)};
  const auto move = [&](size_t c, auto copy) {
    std::byte* mine = static_cast<std::byte*>(data) + chunks.start(c);
    team.parallel(chunks.length(c), 1,
                  [&](size_t begin, size_t end) { copy(mine + begin, begin, end - begin); });
  };
  const auto fill = [&](size_t c, uint32_t epoch) {
    if (!is_root) return;
    move(c, [&](std::byte* mine, size_t at, size_t n) {
      std::memcpy(team.my_slot(epoch) + at, mine, n);
    });
  };
  const auto drain = [&](size_t c, uint32_t epoch) {
    if (is_root) return;
    team.wait(root, epoch);
    move(c, [&](std::byte* mine, size_t at, size_t n) {
      std::memcpy(mine, team.slot(root, epoch) + at, n);
    });
  };
  pipeline(team, chunks.count(), fill, drain);
}

void barrier(Team& team) {
  const Call call(team, {Op::kBarrier, DType::kU8, 0, 0});
  const uint32_t epoch = team.next_step();
  team.publish(epoch);
  team.wait_all(epoch);
}

}  // namespace shm
