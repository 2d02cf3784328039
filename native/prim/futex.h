// Sleeping on a word in shared memory until another process changes it (Linux futex, shared).
//
// The waker stores the word, then wakes; a waiter that read the old value sleeps only if the word
// still holds it, so no wake-up is lost. To save the waker a system call when nobody sleeps,
// waiters count themselves in a word of their own before they sleep; both sides then need
// fence_seq_cst() between their store and their load (see prim/atomic.h).
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>

#include "prim/atomic.h"
#include "prim/deadline.h"

namespace prim {

enum class FutexResult {
  kWoken,        // woken, perhaps spuriously: look at the word again
  kChanged,      // the word did not hold `expected`
  kTimedOut,     // timeout_ns went by
  kInterrupted,  // a signal handler ran
};

// Sleeps while `word` holds `expected`, at most `timeout_ns`.
inline FutexResult futex_wait(const AtomicU32& word, uint32_t expected, int64_t timeout_ns) {
  if (timeout_ns <= 0) return FutexResult::kTimedOut;
  timespec timeout{static_cast<time_t>(timeout_ns / 1'000'000'000),
                   static_cast<long>(timeout_ns % 1'000'000'000)};
  if (syscall(SYS_futex, &word, FUTEX_WAIT, expected, &timeout, nullptr, 0) == 0) {
    return FutexResult::kWoken;
  }
  switch (errno) {
    case EAGAIN:
      return FutexResult::kChanged;
    case ETIMEDOUT:
      return FutexResult::kTimedOut;
    default:
      return FutexResult::kInterrupted;
  }
}

// Wakes at most `count` of those who sleep on `word`; the default is all.
inline void futex_wake(const AtomicU32& word, int count = INT_MAX) {
  syscall(SYS_futex, &word, FUTEX_WAKE, count, nullptr, nullptr, 0);
}

}  // namespace prim
