#include "shm/ring.h"

#include <poll.h>
#include <sched.h>

#include <algorithm>
#include <cstring>

#include "prim/deadline.h"
#include "prim/futex.h"

namespace shm {
namespace {

constexpr char kMagic[8] = {'d', 'e', 'v', 'c', 'r', 'i', 'n', 'g'};
constexpr uint64_t kPage = 4096;

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

ReaderLine* reader_lines(std::byte* base) {
  return reinterpret_cast<ReaderLine*>(base + sizeof(RingHeader));
}

uint64_t awaited_word(uint32_t reader, uint32_t count) {
  return (uint64_t{reader} + 1) << 32 | count;
}

// A spin of 2 to 5 us, in a call that does not give up the interpreter's lock: when both sides are
// busy the other one is at most that far away, and a proper wait costs as much to set up.
template <typename Reached>
bool soon(const Reached& reached) {
  for (int look = 0; look < 20; ++look) {
    if (reached()) return true;
    // Each look takes the word's cache line away from its writer: not too often.
    for (int i = 0; i < 8; ++i) prim::cpu_pause();
  }
  return false;
}

// A writer notes its core once in so many messages; it costs some nanoseconds.
constexpr uint64_t kCpuEvery = 8;

// How long a nudged reader expects its message: about what pickling takes.
constexpr int64_t kNudgeSpinNs = 300'000;

bool process_is_gone(int pidfd) {
  if (pidfd < 0) return pidfd == kGone;
  pollfd ended{pidfd, POLLIN, 0};
  return ::poll(&ended, 1, 0) > 0;
}

// That this process may use.
uint32_t cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  return static_cast<uint32_t>(CPU_COUNT(&allowed));
}

constexpr uint64_t bit(uint32_t reader) { return uint64_t{1} << reader; }

}  // namespace

RingLayout::RingLayout(uint32_t readers, uint32_t slots, uint64_t chunk_bytes,
                       uint64_t arena_bytes) {
  slot_stride = round_up(kSlotHeaderBytes + chunk_bytes, prim::kFalseSharingBytes);
  slots_offset = round_up(sizeof(RingHeader) + readers * sizeof(ReaderLine), kPage);
  arena_offset = round_up(slots_offset + slots * slot_stride, kPage);
  region_bytes = arena_offset + round_up(arena_bytes, kPage);
}

void ring_create(std::byte* base, uint32_t readers, uint32_t slots, uint64_t chunk_bytes,
                 uint64_t arena_bytes, const unsigned char id[16], uint32_t first_message) {
  const RingLayout layout(readers, slots, chunk_bytes, arena_bytes);
  auto* header = reinterpret_cast<RingHeader*>(base);
  header->version = kRingVersion;
  header->readers = readers;
  header->slots = slots;
  header->first_message = first_message;
  header->chunk_bytes = chunk_bytes;
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
      cpu_(cpu),
      yields_(header_->readers + 1 > cores()) {}

void RingEnd::note_cpu() {
  const auto cpu = static_cast<uint32_t>(sched_getcpu() + 1);
  if (prim::load_relaxed(cpu_) != cpu) prim::store_relaxed(cpu_, cpu);
}

template <typename Reached>
bool RingEnd::spin(const Reached& reached, int64_t budget_ns, const prim::AtomicU32& peer) {
  const int64_t until = prim::monotonic_ns() + budget_ns;
  do {
    for (int i = 0; i < 32; ++i) {
      if (reached()) return true;
      prim::cpu_pause();
    }
    // The one that is waited for may need this core: there are too few, or it ran here last and so
    // does not run now. Otherwise a yield would only let strangers have it, for some milliseconds.
    note_cpu();
    if (yields_ || prim::load_relaxed(peer) == prim::load_relaxed(cpu_)) sched_yield();
  } while (!cancelled() && prim::monotonic_ns() < until);
  return reached();
}

// --- the writer ---------------------------------------------------------------------------------

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
  if (kind == SlotKind::kBlock) {
    uint64_t holders = 0;
    for (uint32_t reader = 0; reader < header_->readers; ++reader) {
      if (counts(reader)) holders |= bit(reader);
    }
    prim::store_relaxed(reinterpret_cast<BlockHeader*>(base_ + block)->holders, holders);
  }
  if (sent_ % kCpuEvery == 0) note_cpu();
  *reinterpret_cast<SlotHeader*>(slot(sent_)) = SlotHeader{kind, 0, bytes, block};
  ++sent_;
  header_->published.store(word(sent_), std::memory_order_seq_cst);
  if (header_->sleepers.load(std::memory_order_seq_cst) != 0) {
    prim::futex_wake(header_->published);
  }
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

int64_t RingWriter::allocate_block(uint64_t bytes) {
  arena_.reclaim([this](const Arena::Block& block) { return held(block); });
  look_at_readers();
  uint64_t unread = 0, oldest = sent_;
  for (const Arena::Block& block : arena_.blocks()) {
    if (block.message < all_consumed_) continue;
    unread += block.bytes;
    oldest = std::min(oldest, block.message);
  }
  // Only what a reader will still read is waited for. What readers hold is given more room: they
  // may hold it for as long as they like.
  if (anybody_ && unread > 0 && unread + bytes > unread_limit_) {
    target_ = oldest + 1;
    return kMustWait;
  }
  static_assert(kNoRoom == Arena::kNoRoom && kNoMemory == Arena::kNoMemory);
  return arena_.allocate(bytes, sent_);
}

bool RingWriter::has_slot_soon() {
  return soon([this] { return has_slot(); });
}

void RingWriter::nudge() { prim::futex_wake(header_->published); }

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

// --- a reader -----------------------------------------------------------------------------------

RingReader::RingReader(std::byte* base, uint32_t index, SpinBudget spin)
    : RingEnd(base, reader_lines(base)[index].cpu, spin),
      index_(index),
      received_(header_->first_message) {
  taken_.copied = 0;
}

bool RingReader::join(uint32_t pid, uint64_t start_time) {
  ReaderLine& mine = readers_[index_];
  uint32_t nobody = 0;
  if (!mine.pid.compare_exchange_strong(nobody, pid, std::memory_order_seq_cst)) return false;
  prim::store_relaxed(mine.start_time, start_time);
  prim::store_release(mine.state, static_cast<uint32_t>(ReaderState::kJoined));
  header_->joined.fetch_add(1, std::memory_order_seq_cst);
  prim::futex_wake(header_->joined);
  return true;
}

void RingReader::leave() {
  auto joined = static_cast<uint32_t>(ReaderState::kJoined);
  readers_[index_].state.compare_exchange_strong(joined, static_cast<uint32_t>(ReaderState::kLeft),
                                                 std::memory_order_seq_cst);
  uint64_t awaited = header_->awaited.load(std::memory_order_seq_cst);
  if (awaited >> 32 == index_ + 1) {
    header_->bell.fetch_add(1, std::memory_order_seq_cst);
    prim::futex_wake(header_->bell);
  }
  header_->joined.fetch_add(1, std::memory_order_seq_cst);
  prim::futex_wake(header_->joined);
}

bool RingReader::has_message() const {
  const uint32_t published = header_->published.load(std::memory_order_seq_cst);
  return (published & ~kClosedBit) != static_cast<uint32_t>(received_ << 1);
}

void RingReader::store_consumed() {
  const auto consumed = static_cast<uint32_t>(received_ << 1);
  readers_[index_].consumed.store(consumed, std::memory_order_seq_cst);
  uint64_t awaited = header_->awaited.load(std::memory_order_seq_cst);
  if (awaited >> 32 != index_ + 1) return;
  if (!prim::reached(consumed, static_cast<uint32_t>(awaited))) return;
  if (!header_->awaited.compare_exchange_strong(awaited, 0, std::memory_order_seq_cst)) return;
  header_->bell.fetch_add(1, std::memory_order_seq_cst);
  prim::futex_wake(header_->bell);
}

bool RingReader::take() {
  const uint32_t published = header_->published.load(std::memory_order_acquire) & ~kClosedBit;
  const uint32_t available = (published - static_cast<uint32_t>(received_ << 1)) >> 1;
  if (available == 0) return false;
  note_cpu();
  uint32_t copied = 0;
  uint64_t used = 0;
  while (copied < std::min<uint32_t>(available, kBatchMessages)) {
    const std::byte* at = slot(received_ + copied);
    const auto& header = *reinterpret_cast<const SlotHeader*>(at);
    if (header.kind != SlotKind::kInline || header.bytes > kBatchMessageBytes ||
        used + header.bytes > kBatchBytes) {
      break;
    }
    std::memcpy(taken_.bytes + used, at + kSlotHeaderBytes, header.bytes);
    used += header.bytes;
    taken_.ends[copied++] = static_cast<uint32_t>(used);
  }
  taken_.copied = copied;
  if (copied > 0) {
    received_ += copied;
    store_consumed();
    return true;
  }
  const std::byte* at = slot(received_);
  const auto& header = *reinterpret_cast<const SlotHeader*>(at);
  taken_.kind = header.kind;
  taken_.size = header.bytes;
  taken_.offset = header.kind == SlotKind::kBlock
                      ? header.block
                      : static_cast<uint64_t>(at + kSlotHeaderBytes - base_);
  return true;
}

void RingReader::done() {
  ++received_;
  store_consumed();
}

bool RingReader::take_soon() {
  if (take()) return true;
  return soon([this] { return has_message(); }) && take();
}

WaitResult RingReader::wait(int64_t timeout_ns, bool again, int writer) {
  const auto deadline = prim::Deadline::after_ns(timeout_ns);
  const auto reached = [this] { return has_message(); };
  if (!again) wait_started_ = prim::monotonic_ns();
  const int64_t budget_ns = std::min(spin_.ns(), timeout_ns);
  bool arrived = again ? reached() : spin(reached, budget_ns, header_->writer_cpu);
  while (!arrived) {
    const uint64_t mine = bit(index_);
    header_->sleepers.fetch_or(mine, std::memory_order_seq_cst);
    const uint32_t seen = header_->published.load(std::memory_order_seq_cst);
    auto woken = prim::FutexResult::kChanged;
    if ((seen & kClosedBit) == 0 && !has_message()) {
      woken = prim::futex_wait(header_->published, seen, std::min(deadline.left_ns(), kLivenessNs));
    }
    header_->sleepers.fetch_and(~mine, std::memory_order_seq_cst);
    // Woken for nothing is nudged: the message is being made.
    const bool nudged = woken == prim::FutexResult::kWoken;
    if (nudged ? spin(reached, kNudgeSpinNs, header_->writer_cpu) : reached()) break;
    if (cancelled()) return WaitResult::kCancelled;
    if ((seen & kClosedBit) != 0) return WaitResult::kClosed;
    if (woken == prim::FutexResult::kInterrupted) return WaitResult::kInterrupted;
    // What it wrote before it died is read first: the process, then once more the ring.
    if (process_is_gone(writer) && !has_message()) return WaitResult::kPeerGone;
    if (deadline.passed()) return WaitResult::kTimedOut;
  }
  spin_.waited(prim::monotonic_ns() - wait_started_);
  return WaitResult::kReady;
}

}  // namespace shm
