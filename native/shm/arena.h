// Blocks of address space for large messages: the writer's own list, lowest address first.
//
// The arena is sparse: its end is as far as the machine's memory, and only what was written to
// takes memory, so growing needs no second region. Taking the lowest free address keeps the same
// few pages in use, which are then in the caches. Memory that was in use a short while ago is kept,
// up to a limit, so that a stream does not take and give back the same pages all the time; the rest
// goes back to the system.
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
      : fd_(fd),
        begin_(begin),
        end_(end),
        backed_(begin),
        keep_bytes_(keep_bytes),
        peak_(begin),
        last_peak_(begin) {}

  static constexpr int64_t kNoRoom = -2, kNoMemory = -3;
  // The offset of `bytes` (rounded up to 64) for message number `message`, or one of the above.
  int64_t allocate(uint64_t bytes, uint64_t message);
  void free(uint64_t offset);

  // Frees what `held(block)` denies, and gives back memory that was not in use for some calls.
  template <typename Held>
  void reclaim(const Held& held) {
    size_t kept = 0;
    for (const Block& block : blocks_) {
      if (held(block)) blocks_[kept++] = block;
    }
    if (kept != blocks_.size()) blocks_.resize(kept);
    note_use();
    give_back();
  }

  const std::vector<Block>& blocks() const { return blocks_; }
  uint64_t backed_bytes() const { return backed_ - begin_; }

 private:
  bool back(uint64_t end);
  uint64_t used() const;
  void note_use();
  void give_back();

  int fd_;
  uint64_t begin_, end_;
  uint64_t backed_;  // memory was taken up to here
  uint64_t keep_bytes_;
  uint64_t peak_, last_peak_;  // the furthest that blocks reached, in this period and the last
  uint32_t calls_ = 0;         // of reclaim(), in this period
  std::vector<Block> blocks_;  // by offset
};

}  // namespace shm
