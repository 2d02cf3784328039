// A broadcast ring in shared memory: one writer, up to 64 readers, every reader gets every message.
//
// A slot goes through four states. In the words of the classic layout with one written flag and one
// flag a reader (w r0 r1 ...), and in the words that are really stored: message m lies in slot
// m mod slots, "written" is published > m, and reader r's flag is consumed[r] > m.
//
//   state      flags      who may touch it   what it waits for
//   FREE       0???...    the writer         the writer has not published m yet
//   WRITTEN    1000...    the readers        nobody has read m
//   PART_READ  1???...    readers that have not read m yet
//   READ       1111...    the writer         m + slots may be written: FREE for that message
//
// Readers that have left or died count as having read everything.
//
//   word              owner        transition                                    at rest
//   published         writer       +2 a message (release); bit 0 is set by close 2 * messages
//   consumed[r]       reader r     +2 a message (release), after it was read     = published
//   state[r]          reader r     ABSENT -> JOINED -> LEFT                      JOINED
//                     writer       -> DEAD, once r's process is gone (not if LEFT)
//   sleepers          reader r     sets bit r before it sleeps on `published`,   0
//                                  clears it after;
//                                  the writer only looks, and wakes: after it
//                                  has published, and before, for a reader to
//                                  be up by then (nudge)
//   awaited           writer       0 -> (reader + 1, count) before it sleeps     0
//                     that reader  -> 0 by compare-and-swap once consumed has
//                                  reached count; then bell + 1, and wakes
//   bell              reader       +1, see awaited; the writer sleeps on it      any
//   joined            readers      +1 when one joins or leaves; the writer       any
//                                  sleeps on it in wait_until_ready
//   ready             writer       0 -> 1 when all have joined                   1
//   cpu, writer_cpu   reader, writer  1 + the core that it runs on, if it changed;  any
//                                  a hint for whether to spin or to yield
//   cpus              everybody    or, bits of the CPUs that an end may run on  any
//   block.holders     writer       all live readers' bits before publish         0
//                     reader r     clears bit r when it needs the block no more
//
// No wake-up is lost: a sleeper stores its announcement (sleepers, awaited) and then looks at the
// counter once more, and the other side stores the counter and then looks for announcements; all
// four accesses are sequentially consistent, so at least one side sees the other.
// tests/unit/test_ring_model.py explores this table, state by state, with deaths at every step.
//
// Counters are kept doubled in 32 bits, may wrap, and are compared with prim::reached.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "prim/atomic.h"
#include "prim/futex.h"
#include "shm/arena.h"
#include "shm/cpus.h"

namespace shm {

inline constexpr uint32_t kRingVersion = 3;
inline constexpr uint32_t kMaxReaders = 64;
inline constexpr size_t kRingCpuWords = 16;  // 1024 CPUs; those above are not counted
inline constexpr uint32_t kClosedBit = 1;
// A sleeping reader looks this often whether the writer lives: so long may its death go unnoticed.
// A look costs some 10 us of a core, and an idle reader does nothing else.
inline constexpr int64_t kLivenessNs = 500'000'000;
// A slot holds no more than this, whatever the caller's limit: each of the slots keeps the memory
// of the largest message that it ever held, and there are hundreds. What is larger lies in a block.
inline constexpr uint64_t kMostSlotBytes = 64 << 10;
// In place of a pidfd: the process had ended before it could be opened; or watch nobody.
inline constexpr int kGone = -1, kNobody = -2;

enum class SlotKind : uint32_t {
  kInline = 1,    // a message of enqueue(), whole in the slot
  kRaw = 2,       // bytes that a caller of acquire_write() put there
  kBlock = 3,     // the message lies in a block of the arena; the slot says where
  kRawBlock = 4,  // kRaw, in a block
};

enum class ReaderState : uint32_t { kAbsent, kJoined, kLeft, kDead };

struct alignas(prim::kFalseSharingBytes) ReaderLine {
  prim::AtomicU32 consumed;
  prim::AtomicU32 state;
  prim::AtomicU32 pid;
  prim::AtomicU64 start_time;  // of the process, in clock ticks since boot: pids are used again
  prim::AtomicU32 cpu;
};

struct RingHeader {
  char magic[8];
  uint32_t version;
  uint32_t readers;
  uint32_t slots;
  uint32_t first_message;  // where the counters start; 0 except in tests of wrapping
  uint64_t slot_bytes;
  uint64_t slot_stride;
  uint64_t slots_offset;
  uint64_t arena_offset;
  uint64_t region_bytes;
  unsigned char id[16];

  alignas(prim::kFalseSharingBytes) prim::AtomicU32 published;
  prim::AtomicU32 writer_cpu;
  alignas(prim::kFalseSharingBytes) prim::AtomicU64 sleepers;
  alignas(prim::kFalseSharingBytes) prim::AtomicU64 awaited;
  prim::AtomicU32 bell;
  alignas(prim::kFalseSharingBytes) prim::AtomicU32 joined;
  prim::AtomicU32 ready;
  // Of all ends together: one that is pinned to a core sees that one alone by itself.
  alignas(prim::kFalseSharingBytes) prim::AtomicU64 cpus[kRingCpuWords];
};

struct SlotHeader {
  SlotKind kind;
  uint32_t reserved;
  uint64_t bytes;  // of the payload in the slot, or of the block
  uint64_t block;  // offset of the block in the region; 0: the payload is in the slot
};
inline constexpr size_t kSlotHeaderBytes = prim::kLineBytes;

// The start of a block; the message follows at kBlockHeaderBytes.
struct BlockHeader {
  prim::AtomicU64 holders;
};
inline constexpr size_t kBlockHeaderBytes = prim::kLineBytes;

// Sizes of a region; `region_bytes` is address space, of which only what is written takes memory.
struct RingLayout {
  uint64_t slot_stride, slots_offset, arena_offset, region_bytes;
  RingLayout(uint32_t readers, uint32_t slots, uint64_t slot_bytes, uint64_t arena_bytes);
};

// Writes the header into zeroed memory. `id` tells queues apart.
void ring_create(std::byte* base, uint32_t readers, uint32_t slots, uint64_t slot_bytes,
                 uint64_t arena_bytes, const unsigned char id[16], uint32_t first_message);

// Whether `base` holds a ring of this version, and of this id.
enum class RingCheck { kSame, kNotARing, kOtherVersion, kOtherRing };
RingCheck ring_check(const std::byte* base, const unsigned char id[16]);

// `reader` needs `block` no more.
void ring_release_block(std::byte* base, uint32_t reader, uint64_t block);

enum class WaitResult {
  kReady,
  kTimedOut,
  kClosed,       // the writer has closed, and everything it wrote was read
  kInterrupted,  // a signal arrived: let its handler run, then wait on
  kCancelled,    // cancel() was called from another thread
  kPeerGone,     // the process at the other end has ended
};

// How long to spin before sleeping: twice the usual wait if that is short enough to be worth it,
// else just long enough to catch a message that is on its way.
class SpinBudget {
 public:
  SpinBudget(int64_t least_ns, int64_t most_ns) : least_(least_ns), most_(most_ns) {}
  int64_t ns() const;
  int64_t expected_ns() const { return usual_; }
  void waited(int64_t ns);

 private:
  int64_t least_, most_;
  int64_t usual_ = 0;  // moving average
};

// The end that one side holds: where it maps the region, and how it waits.
class RingEnd {
 public:
  void cancel() { cancelled_.store(1, std::memory_order_seq_cst); }

 protected:
  // `cpu`: this end's word for it.
  RingEnd(std::byte* base, prim::AtomicU32& cpu, SpinBudget spin);
  std::byte* slot(uint64_t message) const {
    return base_ + header_->slots_offset + (message % header_->slots) * header_->slot_stride;
  }
  // Spins while `reached()` is false, within the budget; whether it became true. `peer`: the word
  // for the core of the one that is waited for.
  template <typename Reached>
  bool spin(const Reached& reached, int64_t budget_ns, const prim::AtomicU32& peer);
  void note_cpu();
  // `peer` does not run now: this end has its core.
  bool displaces(const prim::AtomicU32& peer);
  uint32_t cores() const;  // that the ends which have been opened so far may use, together
  uint32_t other_cores() const { return std::max(cores(), 2u) - 1; }
  bool more_ends_than_cores() const { return header_->readers + 1 > cores(); }
  bool cancelled() const { return prim::load_relaxed(cancelled_) != 0; }

  std::byte* base_;
  RingHeader* header_;
  ReaderLine* readers_;
  SpinBudget spin_;
  int64_t wait_started_ = 0;

 private:
  prim::AtomicU32 cancelled_{0};
  prim::AtomicU32& cpu_;
};

class RingWriter : public RingEnd {
 public:
  // `fd`: of the region; `unread_limit`: bytes of blocks that may wait to be read, fewer if they
  // are many.
  RingWriter(std::byte* base, int fd, uint64_t unread_limit, SpinBudget spin);

  // Whether a slot is free, and a reader is there to read it. Looks at the readers only when the
  // last look does not answer it.
  bool has_slot();
  std::byte* slot_payload() const { return slot(sent_) + kSlotHeaderBytes; }
  // Publishes the slot whose payload was written, and wakes who sleeps. Needs has_slot(). With more
  // sleepers than other cores one of them needs this one: it gets it at once.
  void publish(SlotKind kind, uint64_t bytes, uint64_t block = 0);

  // A block for `bytes` of message, or kMustWait (see wait), or kNoRoom. `in_slot_count`: only the
  // number of slots bounds how many such messages may be unread, not unread_limit.
  static constexpr int64_t kMustWait = -1, kNoRoom = -2, kNoMemory = -3;
  int64_t allocate_block(uint64_t bytes, bool in_slot_count = false);
  void free_block(uint64_t block) { arena_.free(block); }

  // has_slot(), after a spin of some microseconds: for a caller who would rather not wait.
  bool has_slot_soon();
  // Waits for what has_slot() or allocate_block() missed, at most `timeout_ns`. A wait that goes on
  // where the last call ended has `again`: it does not spin.
  WaitResult wait(int64_t timeout_ns, bool again);
  // Wakes readers that sleep, one for each other core, ahead of a message that is being made: a
  // wake-up takes longer than that. Those that find no core of their own sleep again.
  void nudge();
  // A hint for whether to do so.
  bool somebody_sleeps() const { return prim::load_relaxed(header_->sleepers) != 0; }

  bool counts(uint32_t reader) const;  // not left, not dead
  // `reader`'s process is gone: what it has not read or not released is nobody's.
  void drop(uint32_t reader);
  void close();
  uint64_t sent() const { return sent_; }
  uint64_t backed_bytes() const { return arena_.backed_bytes(); }
  const prim::AtomicU32& wait_word() const { return header_->bell; }

 private:
  uint32_t word(uint64_t messages) const { return static_cast<uint32_t>(messages << 1); }
  void look_at_readers();
  bool has_consumed(uint32_t reader, uint64_t messages) const;
  bool held(const Arena::Block& block) const;
  void reclaim();
  bool needs_this_core(uint64_t sleepers) const {
    return static_cast<uint32_t>(std::popcount(sleepers)) > other_cores();
  }

  Arena arena_;
  uint64_t unread_limit_;
  uint64_t sent_;          // messages published
  uint64_t all_consumed_;  // every reader that counts has read this many; a lower bound
  uint64_t target_;        // of wait(): until everybody has read this many
  uint32_t slowest_ = 0;
  bool anybody_ = true;  // whether a reader counts
  uint64_t gone_ = 0;    // readers whose process is gone
};

class RingReader : public RingEnd {
 public:
  static constexpr size_t kBatchBytes = 32 << 10;
  static constexpr size_t kBatchMessageBytes = 4 << 10;
  static constexpr int kBatchMessages = 64;

  RingReader(std::byte* base, uint32_t index, SpinBudget spin);

  // False if the place was taken before.
  bool join(uint32_t pid, uint64_t start_time);
  void leave();

  // What take() found. Either `copied` messages of kind kInline, the i-th from ends[i - 1] (0) to
  // ends[i] of `bytes`, which are read; or one message in place, which stays until done().
  struct Taken {
    uint32_t copied;
    SlotKind kind;
    uint64_t offset, size;  // in the region: payload of the slot, or the block
    uint32_t ends[kBatchMessages];
    alignas(prim::kLineBytes) std::byte bytes[kBatchBytes];
  };
  bool take();
  // take(), after a spin of some microseconds if there is nothing yet.
  bool take_soon();
  const Taken* taken() const { return &taken_; }
  const std::byte* at(uint64_t offset) const { return base_ + offset; }
  void done();

  // Waits for a message, at most `timeout_ns`; `again` as in RingWriter::wait. `writer`: its pidfd,
  // looked at every kLivenessNs.
  WaitResult wait(int64_t timeout_ns, bool again, int writer);
  uint64_t received() const { return received_; }
  const prim::AtomicU32& wait_word() const { return header_->published; }

 private:
  bool has_message() const;
  bool is_closed() const;
  prim::FutexResult sleep(int64_t timeout_ns);
  bool await_nudged();
  void store_consumed();

  uint32_t index_;
  uint64_t received_;
  Taken taken_;
};

}  // namespace shm
