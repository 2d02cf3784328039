// What lies in the shared memory of a group, and who may write it when.
//
// Each rank contributes one region and is the only writer of everything in it, but for the words
// that say so. Peers map it. A collective is a number of *steps*, the same number on all ranks, as
// follows from its signature. In step e a rank puts its data into slot e % kSlots of its own
// region, publishes e, waits for the peers to publish the same and reads their slots.
//
// A large message is split over *lanes*, one a thread of a rank. Lane l of a rank works with lane l
// of the others alone: it has steps, epochs and slots of its own, so threads of a rank never wait
// for each other. How many there are is agreed when the ranks meet. A small message takes lane 0.
//
// word                      writer     transition                                        at rest
// Step[e % kSlots].epoch    owner      e - kSlots -> e, after the slot's data,           last epoch
//                                      signature and payload (release)
// Step.signature            owner      with epoch; -> kWithdrawn when the owner gives up   any
// Step.payload              owner      with epoch                                        any
// slot data                 owner      with epoch                                        any
// sleepers                  waiters    +1 before sleeping on an epoch here, -1 after      0
// Control.cpus              owner      before the region is sent to anybody              fixed
// Abort.code                owner      0 -> Code, once, after culprit and text (release) 0
// Channel.head              owner      += bytes put into the ring                        = tail
// Channel.tail              receiver   += bytes taken out of it                          = head
// Channel.*_sleeps          waiter     0 -> 1 before sleeping on head / tail, -> 0 after  0
//
// Epochs are u32, start at 0 in fresh memory (step 1 is the first), only grow and may wrap.
//
// When may slot e % kSlots be written again, for step e + kSlots? When no peer reads it any more.
// No word says so: every algorithm finishes reading step e before it publishes step e + kReadLag,
// so a peer that has published that has read. All-to-all steps never wait for this (they have
// waited for more already); in rooted ones the leading ranks run ahead by kSlots - kReadLag steps.
//
// The region is fresh and zero in every job: nothing of an earlier one can be seen.
#pragma once

#include <cstddef>
#include <cstdint>

#include "prim/atomic.h"
#include "shm/cpus.h"

namespace shm {

inline constexpr uint32_t kSlots = 8;
inline constexpr uint32_t kReadLag = 3;
inline constexpr int kMaxRanks = 64;
inline constexpr int kMaxLanes = 16;
inline constexpr size_t kPayloadBytes = 48;
// Elements: the parts of a chunk start on cache lines, whatever the element size.
inline constexpr size_t kPartAlign = 64;

// One line: a tiny message travels with its flag in one transfer between cores.
struct alignas(prim::kFalseSharingBytes) Step {
  prim::AtomicU32 epoch;
  uint32_t reserved;
  prim::AtomicU64 signature;
  std::byte payload[kPayloadBytes];
};
static_assert(offsetof(Step, payload) + kPayloadBytes == prim::kLineBytes);

// In place of a signature (signature.h), so that a rank that arrives after a peer gave up in this
// step looks at the peer's Abort instead of taking the step for done.
inline constexpr uint64_t kWithdrawn = ~uint64_t{0};

// Why a rank gave up.
enum class Code : uint32_t { kNone, kTimeout, kPeerDied, kMismatch, kInterrupted, kClosed };

struct alignas(prim::kFalseSharingBytes) Abort {
  prim::AtomicU32 code;
  int32_t culprit;
  char text[504];
};

struct alignas(prim::kFalseSharingBytes) Sleepers {
  prim::AtomicU32 count;
};

// A ring of bytes from the owner to one peer; counters wrap, the capacity is a power of two.
struct Channel {
  alignas(prim::kFalseSharingBytes) prim::AtomicU32 head;
  alignas(prim::kFalseSharingBytes) prim::AtomicU32 tail;
  alignas(prim::kFalseSharingBytes) prim::AtomicU32 head_sleeps;
  prim::AtomicU32 tail_sleeps;
};

struct Control {
  uint32_t version;
  uint32_t world_size;
  uint64_t slot_bytes;
  uint64_t ring_bytes;
  Cpus cpus;
  Sleepers sleepers;
  Abort abort;
  Step steps[kMaxLanes][kSlots];
};
inline constexpr uint32_t kLayoutVersion = 2;

// Where things lie in a region; the same on all ranks, from the world size and the bytes allowed.
struct Layout {
  Layout() = default;
  Layout(int world_size, size_t shm_bytes);

  // Divides the slots into those of `count` lanes, or fewer if they would be too small for a step.
  void set_lanes(int count);

  int world_size = 0;
  int lanes = 1;
  size_t slot_bytes = 0;  // of all lanes together
  size_t lane_bytes = 0;  // of a slot of one lane
  size_t ring_bytes = 0;
  size_t channels = 0;  // offsets
  size_t slots = 0;
  size_t rings = 0;
  size_t bytes = 0;

  Control* control(std::byte* base) const { return reinterpret_cast<Control*>(base); }
  Channel* channel(std::byte* base, int to) const {
    return reinterpret_cast<Channel*>(base + channels) + to;
  }
  std::byte* slot(std::byte* base, int lane, uint32_t epoch) const {
    return base + slots + (lane * kSlots + epoch % kSlots) * lane_bytes;
  }
  std::byte* ring(std::byte* base, int to) const { return base + rings + to * ring_bytes; }
};

}  // namespace shm
