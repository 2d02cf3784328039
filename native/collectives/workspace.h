// The memory that the ranks of one node share for their collectives, and how a kernel enters and
// leaves a call on it.
//
// Every rank owns one workspace in its device memory; its peers map it and write into it. Nobody
// reads a peer's memory: a store across the link takes one trip, a load two. Layout of a workspace:
//
//   Control        64 KB      the words of the table below
//   slots          2 x slot   Lamport vectors (prim/gpu_packet.h); kEmpty everywhere at rest
//   ll             2 x ll     LL packets, for small copies; anything at rest
//   bulk           2 x bulk   plain bytes behind counters, for large copies; anything at rest
//
// A slot is divided into one area a sender. Calls use slot 0 and 1 in turn: the parity of the
// epoch.
//
// Why two slots and no barrier are enough. Every call carries at least one word from every rank to
// every other, and a rank's kernel ends only when it has all of its words. So when a rank starts
// call e + 2 it has finished call e + 1, hence every peer has started call e + 1, hence every
// peer's call e has ended, and with it all reading and clearing of the slot that call e + 2 now
// writes into.
//
// clang-format off
// | word            | owner | writer               | transition                       | at rest        |
// |-----------------|-------|----------------------|----------------------------------|----------------|
// | words[].state   | rank  | see class Call       | 2e -> 2e+1 enter -> 2(e+n) leave | even, 2*epoch  |
// | words[].aborted,| rank  | its first failure    | 0 -> 1, never back               | 0              |
// | aborted         |       |                      |                                  |                |
// | entered         | rank  | blocks of big grids  | 0 -> number of blocks -> 0       | 0              |
// | alive[p]        | rank  | peer p, at set-up    | 0 -> 1                           | 1              |
// | started[p]      | rank  | peer p, long calls   | raised to e+1: p has entered e   | <= own epoch   |
// | consumed[b]     | rank  | peer's reducer b     | raised to the first unread piece | <= own epoch   |
// | pushed[b]       | rank  | its own pusher b     | raised to (e, chunks sent)       | any            |
// | arrived[p][b]   | rank  | peer p's pusher b    | raised to (e, chunks sent)       | any            |
// clang-format on
//
// Epochs live here, in device memory, so that a CUDA graph can be replayed any number of times and
// between eager calls. They are 63 bits wide and compared by difference. A call of n pieces adds n.
#pragma once

#include <cstdint>

#include "collectives/workspace_words.h"
#include "prim/gpu_memory.h"
#include "prim/gpu_packet.h"
#include "prim/gpu_shuffle.h"
#include "prim/gpu_spin.h"

namespace collectives {

inline constexpr int kMaxWorld = 8;
#ifdef COMMUNICATORS_STATE_WORDS  // tests make big grids of small ones
inline constexpr int kStateWords = COMMUNICATORS_STATE_WORDS;
#else
inline constexpr int kStateWords = 512;
#endif
inline constexpr int kMaxBlocks = 512;  // of kernels with counters a block
#ifdef COMMUNICATORS_BLOCK_THREADS      // tests, where each is a thread of the operating system
inline constexpr int kMaxThreads = COMMUNICATORS_BLOCK_THREADS;
#else
inline constexpr int kMaxThreads = 512;  // of a block
#endif

struct Control {
  StateWord words[kStateWords];
  uint64_t pushed[kMaxBlocks];
  uint64_t consumed[kMaxBlocks];
  uint64_t arrived[kMaxWorld][kMaxBlocks];
  uint64_t started[kMaxWorld];
  uint32_t alive[kMaxWorld];
  uint32_t aborted;
  uint32_t entered;
};

// Sizes are bytes, multiples of 128. The same on all ranks.
struct Layout {
  uint64_t slot;
  uint64_t ll;
  uint64_t bulk;

  static constexpr uint64_t kControl = 64 * 1024;
  __host__ __device__ uint64_t slot_offset(uint32_t parity) const {
    return kControl + parity * slot;
  }
  __host__ __device__ uint64_t ll_offset(uint32_t parity) const {
    return kControl + 2 * slot + parity * ll;
  }
  __host__ __device__ uint64_t bulk_offset(uint32_t parity) const {
    return kControl + 2 * slot + 2 * ll + parity * bulk;
  }
  __host__ __device__ uint64_t total() const { return kControl + 2 * slot + 2 * ll + 2 * bulk; }
};
static_assert(sizeof(Control) <= Layout::kControl, "Control has outgrown its place");

// One rank's view of all workspaces; a kernel parameter. Divisions are done on the host.
//
// What a kernel needs for its first store to a peer comes first. On sm_90 parameters begin at byte
// 528 of their bank, and a multiprocessor fetches lines of 64 bytes: `inp`, `out`, a number of 32
// bits and then this struct up to pushes[0] end with the first line. When the predecessor does not
// let a kernel in early that is worth 0.08 us.
struct Workspace {
  char* own;                    // base[rank]
  uint64_t second_slot;         // from slot 0 to slot 1: layout.slot
  char* pushes[kMaxWorld - 1];  // where this rank writes, in slot 0 of the peer 1, 2, ... ranks on
  char* base[kMaxWorld];
  uint64_t slot_stride;  // between senders' areas in a slot; the first half of an area holds raw
  uint64_t ll_stride;    // vectors and the second half sums, where a call has both
  uint64_t bulk_stride;
  uint32_t rank;
  uint32_t world;
  gpu::SpinContext spin;
  Layout layout;

  __host__ __device__ Control& control(uint32_t owner) const {
    return *reinterpret_cast<Control*>(base[owner]);
  }
  __host__ __device__ Control& mine() const { return *reinterpret_cast<Control*>(own); }

  // Place of `sender` among the peers of `owner`, 0..world-2.
  __host__ __device__ static uint32_t place(uint32_t sender, uint32_t owner) {
    return sender < owner ? sender : sender - 1;
  }

  // Fills in what follows from the rest.
  __host__ void finish() {
    own = base[rank];
    second_slot = layout.slot;
    for (uint32_t turn = 1; turn < world; ++turn) {
      const uint32_t peer = (rank + turn) % world;
      pushes[turn - 1] = base[peer] + layout.slot_offset(0) + place(rank, peer) * slot_stride;
    }
  }

  // Where peers write here, in slot 0.
  __device__ __forceinline__ char* slots() const { return own + Layout::kControl; }

  // Where `sender` writes its Lamport vectors in `owner`'s slot 0; slot 1 is layout.slot bytes on.
  __device__ __forceinline__ char* slot_area(uint32_t owner, uint32_t sender) const {
    return base[owner] + layout.slot_offset(0) + place(sender, owner) * slot_stride;
  }
  __device__ __forceinline__ uint64_t slot_of(uint64_t epoch) const {
    return (epoch & 1) != 0 ? second_slot : 0;
  }
};

// (epoch, count within the call) as one rising number.
__host__ __device__ inline uint64_t progress(uint64_t epoch, uint64_t count) {
  return (epoch << 24) + count;
}

// A block's part in one call on a workspace: which epoch it is, and the turn to the next one.
//
// A grid of at most kStateWords blocks deals the words out; a block reads the word of its number
// and in the end writes all that it was dealt. So a next call may have any number of blocks, and no
// block writes a word that another one of the same call reads. In a bigger grid the last block to
// enter writes all words: by then every block has read. kSmall promises a grid that is not bigger.
template <bool kSmall = false>
class Call {
 public:
  uint64_t epoch = 0;

  // Needs no data, so it can stand before gpu::dependency_wait().
  __device__ __forceinline__ explicit Call(const Workspace& ws)
      : control_(ws.mine()), big_(!kSmall && gridDim.x > kStateWords) {
    word_ = &control_.words[blockIdx.x % kStateWords];
    first_ = blockIdx.x + threadIdx.x * gridDim.x;
    step_ = gridDim.x * blockDim.x;
  }

  // All that enter() and leave() need of the parameters, for a kernel that sees to it that it is
  // there before the wait is over.
  __device__ __forceinline__ uint64_t prepared() const {
    return reinterpret_cast<uint64_t>(word_) | first_ | step_;
  }

  // By all threads of every block, after gpu::dependency_wait(). One trip to the L2 and no barrier:
  // the first store to a peer waits for the epoch. False: leave the kernel at once, a failure has
  // been reported.
  __device__ __forceinline__ bool enter() {
    const ulonglong2 seen = gpu::ld_relaxed_sys(reinterpret_cast<const ulonglong2*>(word_));
    epoch = seen.x >> 1;
    if (seen.y != 0) return false;
    return true;
  }

  // By all threads of every block that entered, between their first stores to peers and their first
  // wait. Marks the block as busy: a block found busy is a second call in flight, on another
  // stream. The barrier sees to it that no thread reads the state after another has left.
  //
  // The mark travels behind the block's stores and is answered when they have been taken. Only then
  // does the block start to poll: polls that start at once get in the way of its own stores.
  __device__ __forceinline__ void settle(const Workspace& ws) {
    if (leads() && marks()) {
      const uint64_t before = gpu::fetch_or_relaxed_gpu(&word_->state, 1);
      if ((before & 1) != 0) {
        gpu::report_once(ws.spin, gpu::kSpinBusy, ws.rank, epoch, blockIdx.x, epoch * 2, before, 0);
      }
    }
    __syncthreads();
    if (leads() && big_) {
      others_ = gpu::fetch_add_relaxed_gpu(&control_.entered, 1);
    }
  }

  // By all threads at the end of every block that settled.
  __device__ __forceinline__ void leave(uint64_t pieces = 1) {
    const uint64_t next = (epoch + pieces) * 2;
    if (!big_) {
      for (uint32_t word = first_; word < kStateWords; word += step_) {
        gpu::st_relaxed_sys(&control_.words[word].state, next);
      }
    } else if (threadIdx.x < 32) {
      if (gpu::shuffle_first(others_) == gridDim.x - 1) {
        for (uint32_t word = threadIdx.x; word < kStateWords; word += 32) {
          gpu::st_relaxed_sys(&control_.words[word].state, next);
        }
        if (threadIdx.x == 0) gpu::st_relaxed_sys(&control_.entered, 0);
      }
    }
  }

 private:
  // The first thread of the block, told by a number that is at hand.
  __device__ __forceinline__ bool leads() const { return first_ == blockIdx.x; }

  // In a big grid blocks share words, and block 0 marks for all.
  __device__ __forceinline__ bool marks() const { return !big_ || blockIdx.x == 0; }

  Control& control_;
  bool big_;
  StateWord* word_;  // the one that this block reads
  uint32_t first_;   // of those that this thread writes, step_ apart
  uint32_t step_;
  uint32_t others_;  // of thread 0: how many blocks had entered before this one
};

}  // namespace collectives
