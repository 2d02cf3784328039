#include <algorithm>

#include "prim/futex.h"
#include "shm/ring_end.h"

namespace shm {
namespace {

// What a writer does once in so many messages: notes its core, which costs some nanoseconds, and
// looks which blocks are needed no more.
constexpr uint64_t kChoresEvery = 8;

// So many unread blocks are enough to keep both sides busy: more of them may take only a share of
// the limit, so that a stream of large messages goes through memory that is in the caches.
constexpr uint64_t kManyBlocks = 10, kManyShare = 16;

uint64_t awaited_word(uint32_t reader, uint32_t count) {
  return (uint64_t{reader} + 1) << 32 | count;
}

}  // namespace

RingWriter::RingWriter(std::byte* base, int fd, uint64_t unread_limit, SpinBudget spin)
    : RingEnd(base, reinterpret_cast<RingHeader*>(base)->writer_cpu, spin),
      arena_(fd, header_->arena_offset, header_->region_bytes, unread_limit),
      unread_limit_(unread_limit),
      sent_(header_->first_message),
      all_consumed_(sent_),
      target_(sent_) {}

bool RingWriter::counts(uint32_t reader) const {
  const auto state = static_cast<ReaderState>(prim::load_acquire(readers_[reader].state));
  return state == ReaderState::kAbsent || state == ReaderState::kJoined;
}

bool RingWriter::has_consumed(uint32_t reader, uint64_t messages) const {
  const uint32_t consumed = readers_[reader].consumed.load(std::memory_order_seq_cst);
  return prim::reached(consumed, word(messages));
}

void RingWriter::look_at_readers() {
  uint64_t least = sent_;
  anybody_ = false;
  for (uint32_t reader = 0; reader < header_->readers; ++reader) {
    if (!counts(reader)) continue;
    anybody_ = true;
    const uint32_t consumed = prim::load_acquire(readers_[reader].consumed);
    const uint64_t behind = (word(sent_) - consumed) >> 1;
    if (sent_ - behind < least) {
      least = sent_ - behind;
      slowest_ = reader;
    }
  }
  // With nobody there, nothing is written: the next call looks again.
  all_consumed_ = anybody_ ? least : sent_ - header_->slots;
}

bool RingWriter::has_slot() {
  if (sent_ - all_consumed_ < header_->slots) return true;
  look_at_readers();
  if (sent_ - all_consumed_ < header_->slots) return true;
  target_ = sent_ + 1 - header_->slots;
  return false;
}

void RingWriter::publish(SlotKind kind, uint64_t bytes, uint64_t block) {
  if (block != 0) {
    uint64_t holders = 0;
    for (uint32_t reader = 0; reader < header_->readers; ++reader) {
      if (counts(reader)) holders |= bit(reader);
    }
    prim::store_relaxed(reinterpret_cast<BlockHeader*>(base_ + block)->holders, holders);
  }
  if (sent_ % kChoresEvery == 0) {
    note_cpu();
    // Else the memory of a burst of large messages stays while only small ones follow.
    if (kind == SlotKind::kInline && arena_.backed_bytes() > 0) reclaim();
  }
  *reinterpret_cast<SlotHeader*>(slot(sent_)) = SlotHeader{kind, 0, bytes, block};
  ++sent_;
  header_->published.store(word(sent_), std::memory_order_seq_cst);
  const uint64_t asleep = header_->sleepers.load(std::memory_order_seq_cst);
  if (asleep == 0) return;
  prim::futex_wake(header_->published);
  if (needs_this_core(asleep)) sched_yield();
}

// A reader that left holds what it had read until its views are gone, and nothing that it had not.
bool RingWriter::held(const Arena::Block& block) const {
  uint64_t holders =
      prim::load_acquire(reinterpret_cast<BlockHeader*>(base_ + block.offset)->holders) & ~gone_;
  for (uint32_t reader = 0; holders != 0 && reader < header_->readers; ++reader) {
    if ((holders & bit(reader)) != 0 && !counts(reader) &&
        !has_consumed(reader, block.message + 1)) {
      holders &= ~bit(reader);
    }
  }
  return holders != 0;
}

void RingWriter::reclaim() {
  arena_.reclaim([this](const Arena::Block& block) { return held(block); });
}

int64_t RingWriter::allocate_block(uint64_t bytes, bool in_slot_count) {
  reclaim();
  look_at_readers();
  uint64_t unread = 0, unread_blocks = 0, oldest = sent_;
  for (const Arena::Block& block : arena_.blocks()) {
    if (block.message < all_consumed_) continue;
    unread += block.bytes;
    ++unread_blocks;
    oldest = std::min(oldest, block.message);
  }
  // Only what a reader will still read is waited for. What readers hold is given more room: they
  // may hold it for as long as they like.
  const uint64_t limit = unread_blocks < kManyBlocks ? unread_limit_ : unread_limit_ / kManyShare;
  if (!in_slot_count && anybody_ && unread > 0 && unread + bytes > limit) {
    target_ = oldest + 1;
    return kMustWait;
  }
  static_assert(kNoRoom == Arena::kNoRoom && kNoMemory == Arena::kNoMemory);
  return arena_.allocate(bytes, sent_);
}

bool RingWriter::has_slot_soon() {
  return soon([this] { return has_slot(); });
}

void RingWriter::nudge() {
  note_cpu();
  prim::futex_wake(header_->published, static_cast<int>(other_cores()));
}

WaitResult RingWriter::wait(int64_t timeout_ns, bool again) {
  const auto deadline = prim::Deadline::after_ns(timeout_ns);
  const auto reached = [this] {
    look_at_readers();
    return !anybody_ || all_consumed_ >= target_;
  };
  if (!again) wait_started_ = prim::monotonic_ns();
  const int64_t budget_ns = std::min(spin_.ns(), timeout_ns);
  bool arrived = again ? reached() : spin(reached, budget_ns, readers_[slowest_].cpu);
  while (!arrived) {
    const uint32_t bell = header_->bell.load(std::memory_order_seq_cst);
    header_->awaited.store(awaited_word(slowest_, word(target_)), std::memory_order_seq_cst);
    if (!has_consumed(slowest_, target_) && counts(slowest_)) {
      const auto woken = prim::futex_wait(header_->bell, bell, deadline.left_ns());
      if (woken == prim::FutexResult::kInterrupted) return WaitResult::kInterrupted;
    }
    header_->awaited.store(0, std::memory_order_relaxed);
    arrived = reached();
    if (cancelled()) return WaitResult::kCancelled;
    if (!arrived && deadline.passed()) return WaitResult::kTimedOut;
  }
  spin_.waited(prim::monotonic_ns() - wait_started_);
  return cancelled() ? WaitResult::kCancelled : WaitResult::kReady;
}

void RingWriter::drop(uint32_t reader) {
  gone_ |= bit(reader);
  if (counts(reader)) {
    prim::store_release(readers_[reader].state, static_cast<uint32_t>(ReaderState::kDead));
  }
}

void RingWriter::close() {
  header_->published.fetch_or(kClosedBit, std::memory_order_seq_cst);
  prim::futex_wake(header_->published);
  prim::futex_wake(header_->ready);
}

}  // namespace shm
