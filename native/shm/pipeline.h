// A message in chunks through the slots of a lane: a rank fills the next chunk's slot before it
// reads the peers' of this one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "prim/round.h"
#include "shm/team.h"

namespace shm {

inline size_t chunk_bytes(const Team& team, const Lane& lane) {
  return std::min(team.tuning().chunk_bytes, lane.slot_bytes());
}

// A slot of one rank that has a part for each other rank: how many bytes a part takes, and where
// that for `q` begins in the slot of `owner`, which has none for itself.
inline size_t part_bytes(const Team& team, const Lane& lane) {
  const size_t share = chunk_bytes(team, lane) / static_cast<size_t>(team.world_size() - 1);
  return std::max<size_t>(prim::round_down(share, prim::kLineBytes), prim::kLineBytes);
}
inline size_t part_offset(int owner, int q, size_t bytes) {
  return static_cast<size_t>(q - (q > owner)) * bytes;
}

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

}  // namespace shm
