#include "shm/arena.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>

#include "prim/round.h"

namespace shm {
namespace {

using prim::round_up;

constexpr uint64_t kAlign = 64;
constexpr uint64_t kPage = 4096;
// What was in use within this many calls of reclaim(), and this much in any case, is kept.
constexpr uint32_t kPeriodCalls = 64;
constexpr uint64_t kLeastKeptBytes = 4 << 20;

}  // namespace

int64_t Arena::allocate(uint64_t bytes, uint64_t message) {
  if (bytes > end_ - begin_) return kNoRoom;
  bytes = round_up(std::max<uint64_t>(bytes, 1), kAlign);
  uint64_t at = begin_;
  auto before = blocks_.begin();
  for (; before != blocks_.end() && before->offset - at < bytes; ++before) {
    at = before->offset + before->bytes;
  }
  if (end_ - at < bytes) return kNoRoom;
  if (at + bytes > backed_ && !back(at + bytes)) return kNoMemory;
  blocks_.insert(before, Block{at, bytes, message});
  peak_ = std::max(peak_, used());
  return static_cast<int64_t>(at);
}

void Arena::free(uint64_t offset) {
  auto found = std::find_if(blocks_.begin(), blocks_.end(),
                            [&](const Block& block) { return block.offset == offset; });
  if (found != blocks_.end()) blocks_.erase(found);
}

// Takes the memory now: a write to a page that cannot be had would be a SIGBUS.
bool Arena::back(uint64_t end) {
  end = std::min(round_up(end, kPage), end_);
  if (fd_ >= 0) {
    int result;
    do {
      result = ::fallocate(fd_, 0, static_cast<off_t>(backed_), static_cast<off_t>(end - backed_));
    } while (result != 0 && errno == EINTR);
    if (result != 0) return false;
  }
  backed_ = end;
  return true;
}

uint64_t Arena::used() const {
  return blocks_.empty() ? begin_ : blocks_.back().offset + blocks_.back().bytes;
}

void Arena::note_use() {
  if (++calls_ < kPeriodCalls) return;
  calls_ = 0;
  last_peak_ = peak_;
  peak_ = used();
}

// What lies beyond goes back to the system once it is more than half of what was taken.
void Arena::give_back() {
  const uint64_t usual = std::max({peak_, last_peak_, begin_ + kLeastKeptBytes});
  const uint64_t most = std::min(begin_ + keep_bytes_, end_);
  const uint64_t keep = round_up(std::max(used(), std::min(usual, most)), kPage);
  if (backed_ <= keep || backed_ - keep < (backed_ - begin_) / 2) return;
  if (fd_ >= 0 && ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                              static_cast<off_t>(keep), static_cast<off_t>(backed_ - keep)) != 0) {
    return;
  }
  backed_ = keep;
}

}  // namespace shm
