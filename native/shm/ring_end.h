// What both ends of the ring have in common, for ring*.cpp alone.
#pragma once

#include <sched.h>

#include "prim/deadline.h"
#include "shm/ring.h"

namespace shm {

inline ReaderLine* reader_lines(std::byte* base) {
  return reinterpret_cast<ReaderLine*>(base + sizeof(RingHeader));
}

constexpr uint64_t bit(uint32_t reader) { return uint64_t{1} << reader; }

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
    if (displaces(peer) || more_ends_than_cores()) sched_yield();
  } while (!cancelled() && prim::monotonic_ns() < until);
  return reached();
}

}  // namespace shm
