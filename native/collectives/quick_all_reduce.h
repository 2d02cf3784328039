// Quantized two-shot all-reduce: its buffers, protocol and host side. docs/quick_all_reduce.md has
// the algorithm and the codecs (quick_codec.h). Knows nothing of torch.
//
// Every rank owns one buffer that its peers map and store into; nobody reads a peer's memory:
//
//   Control            32 KB    the words of the table below
//   area[parity][shot] 4 x      messages (quick_wire.h), zeros at rest. Shot 0: the other ranks'
//                               parts of the rows that this rank owns. Shot 1: the sums of the
//                               other owners.
//
// Data is its own arrival flag, so there are no fences and no counters, and a thread waits for
// messages alone. A message's place in an area depends on the codec, the world size and its number
// among its owner's, not on the grid. Calls use the parities in turn.
//
// Why two parities and no barrier are enough: a kernel ends when it has all of its messages, each
// of which it has replaced by zeros. So a rank that starts call e + 2 has ended call e + 1, hence
// every peer has started e + 1, hence has ended e, and with it all reading and clearing of what
// call e + 2 writes.
//
// | word             | owner | writer            | transition                     | at rest       |
// |------------------|-------|-------------------|--------------------------------|---------------|
// | words[b].state   | rank  | its block b       | 2e -> 2e+1 busy -> 2e+2 leave  | even, 2*epoch |
// | words[b].aborted | rank  | its first failure | 0 -> 1, never back             | 0             |
// | aborted          | rank  | its first failure | 0 -> 1, never back             | 0             |
//
// Epochs live here, in device memory, so graphs can be replayed any number of times and between
// eager calls. The memory starts as zeros.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "collectives/communicator.h"
#include "collectives/quick_codec.h"
#include "prim/gpu_spin.h"

namespace quick {

inline constexpr int kMaxWorld = 8;
inline constexpr int kMaxBlocks = 1024;
inline constexpr int kMaxThreads = 256;
inline constexpr uint32_t kTileRows = 8;
inline constexpr uint32_t kRowVectors = 256;  // of 16 bytes
inline constexpr uint32_t kTileVectors = kTileRows * kRowVectors;
inline constexpr uint64_t kTileBytes = kTileVectors * 16;

using collectives::StateWord;
struct Control {
  StateWord words[kMaxBlocks];
  uint32_t aborted;
};
inline constexpr uint64_t kControlBytes = 32 * 1024;
static_assert(sizeof(Control) <= kControlBytes, "Control has outgrown its place");

// One rank's view of all buffers; a kernel parameter.
struct View {
  char* base[kMaxWorld];
  uint64_t area_bytes;
  uint32_t rank;
  gpu::SpinContext spin;

  __host__ __device__ Control& control(uint32_t owner) const {
    return *reinterpret_cast<Control*>(base[owner]);
  }
  __host__ __device__ char* area(uint32_t owner, uint64_t epoch, int shot) const {
    return base[owner] + kControlBytes + ((epoch & 1) * 2 + shot) * area_bytes;
  }
};

// Messages of 32 values in one sender's part of one tile: kTileRows / world rows.
constexpr uint32_t messages_of_tile(uint32_t world) { return kTileVectors / 4 / world; }
constexpr uint64_t part_bytes(Codec codec, uint32_t world) {
  const uint64_t m = codec == Codec::kFp ? 0 : 2;
  return messages_of_tile(world) * (kBlock * bits_of(codec) / 8 + m);
}

// Launches the all-reduce of `bytes`, at most `tiles_at_once` tiles, on the current device.
struct Launch {
  int blocks;    // at most; all of them must be resident together
  int threads;   // a block: 32, 64, 128 or 256
  int ahead;     // messages that a thread sends before it reads, and reads before it gathers
  bool overlap;  // programmatic dependent launch
};
void all_reduce(const View& view, uint32_t world, Codec codec, DType dtype, const void* inp,
                void* out, uint64_t bytes, const Launch& launch, gpu::Stream stream);
// Most tiles of one launch: as many parts as an area holds.
uint64_t tiles_at_once(const View& view, uint32_t world, Codec codec);

// The quantized all-reduce of one rank: picks the launch and cuts long messages.
class QuickAllReduce : public collectives::Communicator {
 public:
  static constexpr const char* kName = "QuickAllReduce";

  // `bases`: this process's addresses of all ranks' buffers, zeroed when they were allocated.
  QuickAllReduce(const std::vector<char*>& bases, int rank, uint64_t area_bytes)
      : QuickAllReduce(over(bases, rank, area_bytes), static_cast<uint32_t>(bases.size())) {}

  // Sum of `bytes` of fp16 or bf16; pointers aligned to an element; in place or not.
  void run(Codec codec, DType dtype, const void* inp, void* out, uint64_t bytes,
           gpu::Stream stream);
  // 0: the default.
  void set_shape(int blocks, int threads, int ahead);
  void set_overlap(bool overlap) { overlap_ = overlap && can_overlap_; }

  // The shape of a launch over `tiles`.
  Launch shape(Codec codec, uint64_t tiles) const;

  static uint64_t buffer_bytes(uint64_t area_bytes) { return kControlBytes + 4 * area_bytes; }

 protected:
  std::string call_of(const gpu::SpinReport&) const override { return "quick_all_reduce"; }
  std::string wait_of(const gpu::SpinReport& report) const override;

 private:
  QuickAllReduce(const View& view, uint32_t world);
  static View over(const std::vector<char*>& bases, int rank, uint64_t area_bytes);

  View view_;  // but for `spin`, which each call has of its own
  uint32_t world_;
  int processors_;
  int blocks_ = 0;
  int threads_ = 0;
  int ahead_ = 0;
  bool can_overlap_;
  bool overlap_;
};

}  // namespace quick
