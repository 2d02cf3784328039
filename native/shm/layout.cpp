#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "prim/round.h"
#include "shm/protocol.h"

namespace shm {
namespace {

using prim::round_up;

constexpr size_t kPage = 4096;
// The ranks of a group share this much: containers often have 64 MB of /dev/shm, and a job has
// several groups (world, tensor, pipeline, data). Large groups still give each rank kRankBytes.
constexpr size_t kGroupBytes = size_t{16} << 20;
constexpr size_t kRankBytes = size_t{512} << 10;
constexpr size_t kMaxSlot = size_t{512} << 10;  // more would not stay in a core's cache
constexpr size_t kMaxRing = size_t{256} << 10;
constexpr size_t kMinRing = 1024;
constexpr size_t kMinLane = size_t{32} << 10;  // less, and steps cost more than what they move

// What a two-shot all_reduce needs of a slot: room for a line-aligned part of each other rank.
size_t least_slot(size_t ranks) { return kPartAlign * sizeof(double) * (ranks - 1); }

}  // namespace

Layout::Layout(int ranks, size_t shm_bytes) : world_size(ranks) {
  if (ranks < 2 || ranks > kMaxRanks) {
    throw std::runtime_error("InvalidArgumentError: CPU shared memory: world size " +
                             std::to_string(ranks) + " is not in 2..64");
  }
  const auto w = static_cast<size_t>(ranks);
  const size_t budget = std::min(shm_bytes, std::max(kGroupBytes / w, kRankBytes));
  channels = round_up(sizeof(Control), kPage);
  rings = round_up(channels + w * sizeof(Channel), kPage);
  const size_t min_slot = round_up(least_slot(w), kPage);
  const auto with_ring = [&](size_t ring) {
    ring_bytes = ring;
    slots = round_up(rings + w * ring, kPage);
    return slots + kSlots * min_slot;
  };
  size_t ring = std::clamp(std::bit_floor(budget / 4 / w), kMinRing, kMaxRing);
  while (with_ring(ring) > budget && ring > kMinRing) ring /= 2;
  if (const size_t least = with_ring(ring); budget < least) {
    throw std::runtime_error(
        "InvalidArgumentError: CPU shared memory: " + std::to_string(shm_bytes) +
        " bytes a rank (COMMUNICATORS_SHM_BYTES) are too few; " + std::to_string(least) +
        " are needed for " + std::to_string(ranks) + " ranks");
  }
  slot_bytes = std::min((budget - slots) / kSlots / kPage * kPage, kMaxSlot);
  bytes = slots + kSlots * slot_bytes;
  set_lanes(1);
}

void Layout::set_lanes(int count) {
  const size_t room = slot_bytes / std::max(least_slot(static_cast<size_t>(world_size)), kMinLane);
  lanes = std::clamp(count, 1, static_cast<int>(std::clamp<size_t>(room, 1, kMaxLanes)));
  lane_bytes = slot_bytes / static_cast<size_t>(lanes) / kPage * kPage;
}

}  // namespace shm
