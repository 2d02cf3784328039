// Blocks of address space for large messages: the writer's own list, lowest address first.
//
// The arena is sparse: its end is as far as the machine's memory, and only what was written to
// takes memory, so growing needs no second region. Taking the lowest free address keeps the same
// few pages in use, which are then in the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace shm {

class Arena {
 public:
  struct Block {
    uint64_t offset, bytes;
    uint64_t message;  // its number
  };

  // Offsets are in the file `fd`; -1: memory that needs no backing (tests).
  Arena(int fd, uint64_t begin, uint64_t end, uint64_t keep_bytes)
      : fd_(fd), begin_(begin), end_(end), backed_(begin), keep_bytes_(keep_bytes) {}

  static constexpr int64_t kNoRoom = -2, kNoMemory = -3;
  // The offset of `bytes` (rounded up to 64) for message number `message`, or one of the above.
  int64_t allocate(uint64_t bytes, uint64_t message);
  void free(uint64_t offset);

  // Frees what `held(block)` denies.
  template <typename Held>
  void reclaim(const Held& held) {
    size_t kept = 0;
    for (const Block& block : blocks_) {
      if (held(block)) blocks_[kept++] = block;
    }
    if (kept != blocks_.size()) blocks_.resize(kept);
    give_back();
  }

  const std::vector<Block>& blocks() const { return blocks_; }
  uint64_t backed_bytes() const { return backed_ - begin_; }

 private:
  bool back(uint64_t end);
  void give_back();

  int fd_;
  uint64_t begin_, end_;
  uint64_t backed_;  // memory was taken up to here
  uint64_t keep_bytes_;
  std::vector<Block> blocks_;  // by offset
};

}  // namespace shm
