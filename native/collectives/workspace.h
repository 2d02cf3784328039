// The memory that the ranks of one node share for their collectives, and how a kernel enters and
// leaves a call on it.
//
// Every rank owns one workspace in its device memory; its peers map it and write into it. Nobody
// reads a peer's memory: a store across the link takes one trip, a load two. Layout of a workspace:
//
//   Control        64 KB      the words of the table below
//   slots          2 x slot   marked vectors (prim/gpu_packet.h); kEmpty everywhere at rest
//   tagged         2 x tag    tagged packets, for small copies; anything at rest
//   bulk           2 x bulk   plain bytes behind counters, for large copies; anything at rest
//
// A slot is divided into one area a sender. Calls use slot 0 and 1 in turn: the parity of the epoch.
//
// Why two slots and no barrier are enough. Every call carries at least one word from every rank to
// every other, and a rank's kernel ends only when it has all of its words. So when a rank starts call
// e + 2 it has finished call e + 1, hence every peer has started call e + 1, hence every peer's call
// e has ended, and with it all reading and clearing of the slot that call e + 2 now writes into.
//
// | word         | owner | writer              | transition                        | at rest        |
// |--------------|-------|---------------------|-----------------------------------|----------------|
// | state[b]     | rank  | its block b         | 2e -> 2e+1 enter -> 2(e+n) leave  | even, 2*epoch  |
// | aborted      | rank  | its first failure   | 0 -> 1, never back                | 0              |
// | alive[p]     | rank  | peer p, at set-up   | 0 -> 1                            | 1              |
// | started[p]   | rank  | peer p, long calls  | raised to e+1: p has entered e    | <= own epoch   |
// | consumed[b]  | rank  | peer's reducer b    | raised to the first unread piece  | <= own epoch   |
// | pushed[b]    | rank  | its own pusher b    | raised to (e, chunks sent)        | any            |
// | arrived[p][b]| rank  | peer p's pusher b   | raised to (e, chunks sent)        | any            |
// | ready, sent, | rank  | see all_reduce_copy_engine.cu                           |                |
// | landed, taken|       |                                                         |                |
//
// Epochs live here, in device memory, so that a CUDA graph can be replayed any number of times and
// between eager calls. They are 63 bits wide and compared by difference. A call of n pieces adds n.
#pragma once

#include <cstdint>

#include "prim/gpu_memory.h"
#include "prim/gpu_packet.h"
#include "prim/gpu_spin.h"

namespace collectives {

inline constexpr int kMaxWorld = 8;
inline constexpr int kMaxBlocks = 512;
inline constexpr int kCopyLanes = 2;     // copy streams of the copy-engine all-reduce
inline constexpr int kCopyAdders = 128;  // most blocks of its adding kernel

struct Control {
  uint64_t state[kMaxBlocks];
  uint64_t pushed[kMaxBlocks];
  uint64_t consumed[kMaxBlocks];
  uint64_t arrived[kMaxWorld][kMaxBlocks];
  uint64_t started[kMaxWorld];
  uint64_t ready;
  uint64_t copy_epoch;
  uint64_t sent[kCopyLanes];
  uint64_t landed[kCopyLanes];
  uint64_t taken[kCopyAdders];
  uint32_t alive[kMaxWorld];
  uint32_t aborted;
};

// Sizes are bytes, multiples of 128. The same on all ranks.
struct Layout {
  uint64_t slot;
  uint64_t tagged;
  uint64_t bulk;

  static constexpr uint64_t kControl = 64 * 1024;
  __host__ __device__ uint64_t slot_offset(uint32_t parity) const {
    return kControl + parity * slot;
  }
  __host__ __device__ uint64_t tagged_offset(uint32_t parity) const {
    return kControl + 2 * slot + parity * tagged;
  }
  __host__ __device__ uint64_t bulk_offset(uint32_t parity) const {
    return kControl + 2 * slot + 2 * tagged + parity * bulk;
  }
  __host__ __device__ uint64_t total() const {
    return kControl + 2 * slot + 2 * tagged + 2 * bulk;
  }
};
static_assert(sizeof(Control) <= Layout::kControl, "Control has outgrown its place");

// One rank's view of all workspaces; a kernel parameter.
struct Workspace {
  char* base[kMaxWorld];
  Layout layout;
  uint32_t rank;
  uint32_t world;
  gpu::SpinContext spin;

  __host__ __device__ Control& control(uint32_t owner) const {
    return *reinterpret_cast<Control*>(base[owner]);
  }
  __host__ __device__ Control& mine() const { return control(rank); }

  // Place of `sender` among the peers of `owner`, 0..world-2.
  __host__ __device__ static uint32_t place(uint32_t sender, uint32_t owner) {
    return sender < owner ? sender : sender - 1;
  }

  // Part `place` of `parts` equal parts of a region of `size` bytes at `offset` in `owner`.
  __host__ __device__ char* part(uint32_t owner, uint64_t offset, uint64_t size, uint32_t place,
                                 uint32_t parts) const {
    return base[owner] + offset + place * (size / parts & ~uint64_t{127});
  }

  // Where `sender` writes its marked vectors in `owner`'s slot, when a slot has one area a sender.
  __device__ __forceinline__ uint4* slot_area(uint32_t owner, uint64_t epoch,
                                              uint32_t sender) const {
    return reinterpret_cast<uint4*>(
        part(owner, layout.slot_offset(epoch & 1), layout.slot, place(sender, owner), world - 1));
  }
};

// (epoch, count within the call) as one rising number.
__host__ __device__ inline uint64_t progress(uint64_t epoch, uint64_t count) {
  return (epoch << 24) + count;
}

struct Entry {
  uint64_t epoch;
  bool ok;  // false: leave at once, the failure has been reported
};

// Called once by all threads of every block, after gpu::dependency_wait(). Takes the epoch and marks
// the block as busy: a block found busy is a second call in flight, on another stream.
__device__ __forceinline__ Entry enter(const Workspace& ws) {
  __shared__ uint64_t before;
  __shared__ uint32_t aborted;
  Control& control = ws.mine();
  if (threadIdx.x == 0) {
    aborted = gpu::ld_relaxed_sys(&control.aborted);
    before = gpu::fetch_or_relaxed_gpu(&control.state[blockIdx.x], 1);
  }
  __syncthreads();
  const Entry entry{before >> 1, (before & 1) == 0 && aborted == 0};
  if (entry.ok && entry.epoch == 0) {
    // The first call of all: peers may not have prepared their slots yet.
    gpu::Spin spin;
    while (threadIdx.x < ws.world && threadIdx.x != ws.rank &&
           gpu::ld_relaxed_sys(&control.alive[threadIdx.x]) == 0) {
      if (spin.give_up(ws.spin, threadIdx.x, 0, 0, 1, 0)) break;
    }
    __syncthreads();
  }
  if ((before & 1) != 0 && aborted == 0 && threadIdx.x == 0) {
    gpu::report_once(ws.spin, gpu::kSpinBusy, ws.rank, entry.epoch, blockIdx.x, entry.epoch,
                     before, 0);
  }
  return entry;
}

// Called by all threads of every block that entered with ok. Block b writes the words b, b + G, ...
// of a grid of G blocks, so the next call may have any number of blocks and no block reads a word
// that another block of the same call writes.
__device__ __forceinline__ void leave(const Workspace& ws, const Entry& entry, uint64_t pieces = 1) {
  Control& control = ws.mine();
  for (uint32_t b = blockIdx.x + threadIdx.x * gridDim.x; b < kMaxBlocks;
       b += blockDim.x * gridDim.x) {
    gpu::st_relaxed_sys(&control.state[b], (entry.epoch + pieces) * 2);
  }
}

}  // namespace collectives
