#include <poll.h>

#include <algorithm>
#include <cstring>

#include "prim/futex.h"
#include "shm/ring_end.h"

namespace shm {
namespace {

// How long a nudged reader expects its message: about what pickling takes after a silence.
constexpr int64_t kNudgeSpinNs = 300'000;

bool process_is_gone(int pidfd) {
  if (pidfd < 0) return pidfd == kGone;
  pollfd ended{pidfd, POLLIN, 0};
  return ::poll(&ended, 1, 0) > 0;
}

}  // namespace

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

bool RingReader::is_closed() const {
  return (header_->published.load(std::memory_order_seq_cst) & kClosedBit) != 0;
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
  taken_.offset =
      header.block != 0 ? header.block : static_cast<uint64_t>(at + kSlotHeaderBytes - base_);
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

// Sleeps until woken, or there is a message or an end, at most `timeout_ns`.
prim::FutexResult RingReader::sleep(int64_t timeout_ns) {
  header_->sleepers.fetch_or(bit(index_), std::memory_order_seq_cst);
  const uint32_t seen = header_->published.load(std::memory_order_seq_cst);
  const bool nothing_yet = seen == static_cast<uint32_t>(received_ << 1) && !cancelled();
  const auto woken = nothing_yet ? prim::futex_wait(header_->published, seen, timeout_ns)
                                 : prim::FutexResult::kChanged;
  header_->sleepers.fetch_and(~bit(index_), std::memory_order_seq_cst);
  return woken;
}

// Whether the message of a nudge came. Without yields: who else is ready to run waits for the same
// message, or has nothing to do with it.
bool RingReader::await_nudged() {
  const int64_t until = prim::monotonic_ns() + kNudgeSpinNs;
  do {
    for (int i = 0; i < 32; ++i) {
      if (has_message()) return true;
      prim::cpu_pause();
    }
  } while (!displaces(header_->writer_cpu) && !cancelled() && prim::monotonic_ns() < until);
  return has_message();
}

WaitResult RingReader::wait(int64_t timeout_ns, bool again, int writer) {
  const auto deadline = prim::Deadline::after_ns(timeout_ns);
  const auto reached = [this] { return has_message(); };
  if (!again) wait_started_ = prim::monotonic_ns();
  const int64_t budget_ns = std::min(spin_.ns(), timeout_ns);
  bool arrived = again ? reached() : spin(reached, budget_ns, header_->writer_cpu);
  while (!arrived) {
    const auto woken = sleep(std::min(deadline.left_ns(), kLivenessNs));
    // Woken for nothing is nudged: the message is being made.
    if (woken == prim::FutexResult::kWoken ? await_nudged() : reached()) break;
    if (cancelled()) return WaitResult::kCancelled;
    // What it wrote before it closed, or died, is read first: the end, then once more the ring.
    if (is_closed() && !has_message()) return WaitResult::kClosed;
    if (woken == prim::FutexResult::kInterrupted) return WaitResult::kInterrupted;
    if (process_is_gone(writer) && !has_message()) return WaitResult::kPeerGone;
    if (deadline.passed()) return WaitResult::kTimedOut;
  }
  spin_.waited(prim::monotonic_ns() - wait_started_);
  return WaitResult::kReady;
}

}  // namespace shm
