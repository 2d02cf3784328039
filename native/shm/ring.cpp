#include "shm/ring.h"

#include <algorithm>
#include <cstring>

#include "prim/round.h"
#include "shm/ring_end.h"

namespace shm {
namespace {

using prim::round_up;

constexpr char kMagic[8] = {'d', 'e', 'v', 'c', 'r', 'i', 'n', 'g'};
constexpr uint64_t kPage = 4096;

}  // namespace

RingLayout::RingLayout(uint32_t readers, uint32_t slots, uint64_t slot_bytes,
                       uint64_t arena_bytes) {
  slot_stride = round_up(kSlotHeaderBytes + slot_bytes, prim::kFalseSharingBytes);
  slots_offset = round_up(sizeof(RingHeader) + readers * sizeof(ReaderLine), kPage);
  arena_offset = round_up(slots_offset + slots * slot_stride, kPage);
  region_bytes = arena_offset + round_up(arena_bytes, kPage);
}

void ring_create(std::byte* base, uint32_t readers, uint32_t slots, uint64_t slot_bytes,
                 uint64_t arena_bytes, const unsigned char id[16], uint32_t first_message) {
  const RingLayout layout(readers, slots, slot_bytes, arena_bytes);
  auto* header = reinterpret_cast<RingHeader*>(base);
  header->version = kRingVersion;
  header->readers = readers;
  header->slots = slots;
  header->first_message = first_message;
  header->slot_bytes = slot_bytes;
  header->slot_stride = layout.slot_stride;
  header->slots_offset = layout.slots_offset;
  header->arena_offset = layout.arena_offset;
  header->region_bytes = layout.region_bytes;
  std::memcpy(header->id, id, sizeof header->id);
  prim::store_relaxed(header->published, first_message << 1);
  for (uint32_t reader = 0; reader < readers; ++reader) {
    prim::store_relaxed(reader_lines(base)[reader].consumed, first_message << 1);
  }
  std::memcpy(header->magic, kMagic, sizeof kMagic);
}

RingCheck ring_check(const std::byte* base, const unsigned char id[16]) {
  const auto* header = reinterpret_cast<const RingHeader*>(base);
  if (std::memcmp(header->magic, kMagic, sizeof kMagic) != 0) return RingCheck::kNotARing;
  if (header->version != kRingVersion) return RingCheck::kOtherVersion;
  if (std::memcmp(header->id, id, sizeof header->id) != 0) return RingCheck::kOtherRing;
  return RingCheck::kSame;
}

void ring_release_block(std::byte* base, uint32_t reader, uint64_t block) {
  reinterpret_cast<BlockHeader*>(base + block)
      ->holders.fetch_and(~bit(reader), std::memory_order_release);
}

int64_t SpinBudget::ns() const {
  return usual_ < most_ / 2 ? std::max(least_, 2 * usual_) : least_;
}

void SpinBudget::waited(int64_t ns) {
  usual_ += (std::min(ns, 4 * most_) - usual_) / 4;  // a long silence is forgotten in a few waits
}

RingEnd::RingEnd(std::byte* base, prim::AtomicU32& cpu, SpinBudget spin)
    : base_(base),
      header_(reinterpret_cast<RingHeader*>(base)),
      readers_(reader_lines(base)),
      spin_(spin),
      cpu_(cpu) {
  CpuMask mine = {};
  read_affinity(mine);
  for (size_t i = 0; i < kRingCpuWords; ++i) {
    if (mine[i] != 0) header_->cpus[i].fetch_or(mine[i], std::memory_order_relaxed);
  }
}

uint32_t RingEnd::cores() const {
  int count = 0;
  for (const prim::AtomicU64& some : header_->cpus)
    count += std::popcount(prim::load_relaxed(some));
  return static_cast<uint32_t>(std::max(count, 1));
}

void RingEnd::note_cpu() {
  const auto cpu = static_cast<uint32_t>(sched_getcpu() + 1);
  if (prim::load_relaxed(cpu_) != cpu) prim::store_relaxed(cpu_, cpu);
}

bool RingEnd::displaces(const prim::AtomicU32& peer) {
  note_cpu();
  return prim::load_relaxed(peer) == prim::load_relaxed(cpu_);
}

}  // namespace shm
