// Quantized two-shot all-reduce: its buffers, protocol and host side. docs/quick_all_reduce.md has
// the algorithm and the codecs (quick_codec.h). Knows nothing of torch.
//
// Every rank owns one buffer that its peers map and store into; nobody reads a peer's memory:
//
//   Control            128 KB   the words of the table below
//   area[parity][shot] 4 x      encoded parts; anything at rest. Shot 0: other ranks' parts of the
//                               rows that this rank owns. Shot 1: the sums of the other owners.
//
// In an area, part (tile, sender) lies at a place that depends on the codec and the world size
// alone. Calls use the parities in turn.
//
// Why two parities and no barrier are enough: every block of a call waits for words from every
// peer, so a rank that starts call e + 2 has ended call e + 1, hence every peer has started e + 1,
// hence has ended e, and with it all reading of what call e + 2 overwrites.
//
// | word             | owner | writer            | transition                     | at rest       |
// |------------------|-------|-------------------|--------------------------------|---------------|
// | state[b]         | rank  | its block b       | 2e -> 2e+1 enter -> 2e+2 leave | even, 2*epoch |
// | arrived[s][p][b] | rank  | peer p's block b  | raised to (e, tiles of shot s) | any           |
// | aborted          | rank  | its first failure | 0 -> 1, never back             | 0             |
//
// Epochs live here, in device memory, so graphs can be replayed any number of times and between
// eager calls. The memory starts as zeros.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "collectives/quick_codec.h"
#include "prim/gpu_spin.h"

namespace quick {

inline constexpr int kMaxWorld = 8;
inline constexpr int kMaxBlocks = 512;
inline constexpr int kThreads = 256;
inline constexpr int kTileRows = 8;
inline constexpr uint32_t kRowVectors = kThreads;  // vectors of 16 bytes, one a thread
inline constexpr uint64_t kTileBytes = kTileRows * kRowVectors * 16;

struct Control {
  uint64_t state[kMaxBlocks];
  uint64_t arrived[2][kMaxWorld][kMaxBlocks];
  uint32_t aborted;
};
inline constexpr uint64_t kControlBytes = 128 * 1024;
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

// Bytes of one sender's part of one tile: kTileRows / world rows, encoded.
constexpr uint64_t part_bytes(Codec codec, uint32_t world) {
  const uint64_t values = kTileBytes / 2 / world;
  const uint64_t extremes = codec == Codec::kFp ? 0 : values / kBlock * 2;
  return values * bits_of(codec) / 8 + extremes;
}

// Thrown with the codes that the C interface returns.
enum class Failure : int { kTimeout = 1, kBusy = 2, kArgument = 3, kPlatform = 4 };
class Error : public std::runtime_error {
 public:
  Error(Failure failure, const std::string& text) : std::runtime_error(text), failure(failure) {}
  const Failure failure;
};

// Launches the all-reduce of `bytes`, at most `tiles_at_once` tiles, on the current device.
struct Launch {
  int blocks;
  bool overlap;  // programmatic dependent launch
};
void all_reduce(const View& view, uint32_t world, Codec codec, Half half, const void* inp,
                void* out, uint64_t bytes, const Launch& launch, gpu::Stream stream);
// Most tiles of one launch: as many parts as an area holds.
uint64_t tiles_at_once(const View& view, uint32_t world, Codec codec);

// One rank's communicator: cuts long messages, and turns device-side reports into errors.
class QuickAllReduce {
 public:
  // `bases`: this process's addresses of all ranks' buffers, zeroed when they were allocated.
  QuickAllReduce(const std::vector<char*>& bases, int rank, uint64_t area_bytes);
  ~QuickAllReduce();
  QuickAllReduce(const QuickAllReduce&) = delete;
  QuickAllReduce& operator=(const QuickAllReduce&) = delete;

  // Sum of `bytes` of fp16 or bf16; pointers aligned to an element; in place or not.
  void run(Codec codec, Half half, const void* inp, void* out, uint64_t bytes, gpu::Stream stream);
  // Throws what the device has reported since the communicator was made.
  void check() const;
  // Makes every kernel on this rank's buffer from now on end at once.
  void retire();
  void set_timeout_ns(uint64_t timeout_ns) { view_.spin.timeout_ns = timeout_ns; }
  void set_blocks(int blocks);
  void set_overlap(bool overlap) { overlap_ = overlap && can_overlap_; }
  int device() const { return device_; }

  static uint64_t buffer_bytes(uint64_t area_bytes) { return kControlBytes + 4 * area_bytes; }

 private:
  View view_{};
  uint32_t world_ = 0;
  int device_ = 0;
  int blocks_ = 0;
  bool can_overlap_ = false;
  bool overlap_ = false;
  gpu::SpinReport* report_ = nullptr;  // pinned
};

}  // namespace quick
