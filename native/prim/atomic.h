// Atomic words that processes share, with the memory ordering in the name.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace prim {

using AtomicU32 = std::atomic<uint32_t>;
using AtomicU64 = std::atomic<uint64_t>;

// Between processes an atomic has to be a plain word: a lock would live in one of them.
static_assert(AtomicU32::is_always_lock_free && AtomicU64::is_always_lock_free);
static_assert(sizeof(AtomicU32) == 4 && sizeof(AtomicU64) == 8);

// Two lines: neighbouring lines are fetched in pairs on x86-64, and 128 bytes is a line on some
// aarch64 cores.
inline constexpr size_t kFalseSharingBytes = 128;
inline constexpr size_t kLineBytes = 64;

template <typename T>
inline T load_acquire(const std::atomic<T>& word) {
  return word.load(std::memory_order_acquire);
}

template <typename T>
inline T load_relaxed(const std::atomic<T>& word) {
  return word.load(std::memory_order_relaxed);
}

template <typename T>
inline void store_release(std::atomic<T>& word, T value) {
  word.store(value, std::memory_order_release);
}

template <typename T>
inline void store_relaxed(std::atomic<T>& word, T value) {
  word.store(value, std::memory_order_relaxed);
}

// Orders a store before a later load of another word (publish, then look for sleepers).
inline void fence_seq_cst() { std::atomic_thread_fence(std::memory_order_seq_cst); }

// Epochs are monotonic and may wrap: whether `seen` is `expected` or later.
inline bool reached(uint32_t seen, uint32_t expected) {
  return static_cast<int32_t>(seen - expected) >= 0;
}

// Tells the core that this is a spin loop.
inline void cpu_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // as long as a pause; "yield" is a no-op on most cores
#endif
}

}  // namespace prim
