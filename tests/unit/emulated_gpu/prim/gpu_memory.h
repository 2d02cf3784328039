// Stands in for native/prim/gpu_memory.h: each word is atomic, the vector is not.
#pragma once

#include "prim/gpu.h"

namespace gpu {

template <typename T>
T ld_word(const T* address, std::memory_order order) {
  std::this_thread::yield();
  return std::atomic_ref(*const_cast<T*>(address)).load(order);
}
template <typename T>
void st_word(T* address, T value, std::memory_order order) {
  std::atomic_ref(*address).store(value, order);
}
constexpr auto kRelaxed = std::memory_order_relaxed;

inline uint4 ld_relaxed_sys(const uint4* a) {
  return {ld_word(&a->x, kRelaxed), ld_word(&a->y, kRelaxed), ld_word(&a->z, kRelaxed),
          ld_word(&a->w, kRelaxed)};
}
inline void st_relaxed_sys(uint4* a, uint4 v) {
  st_word(&a->w, v.w, kRelaxed);
  std::this_thread::yield();  // torn on purpose
  st_word(&a->x, v.x, kRelaxed);
  st_word(&a->z, v.z, kRelaxed);
  st_word(&a->y, v.y, kRelaxed);
}
inline ulonglong2 ld_relaxed_sys(const ulonglong2* a) {
  return {ld_word(&a->x, kRelaxed), ld_word(&a->y, kRelaxed)};
}
inline void st_relaxed_sys(ulonglong2* a, ulonglong2 v) {
  st_word(&a->y, v.y, kRelaxed);
  std::this_thread::yield();
  st_word(&a->x, v.x, kRelaxed);
}
inline uint16_t ld_relaxed_sys(const uint16_t* a) { return ld_word(a, kRelaxed); }
inline void st_relaxed_sys(uint16_t* a, uint16_t v) { st_word(a, v, kRelaxed); }
inline uint32_t ld_relaxed_sys(const uint32_t* a) { return ld_word(a, kRelaxed); }
inline uint64_t ld_relaxed_sys(const uint64_t* a) { return ld_word(a, kRelaxed); }
inline void st_relaxed_sys(uint32_t* a, uint32_t v) { st_word(a, v, kRelaxed); }
inline void st_relaxed_sys(uint64_t* a, uint64_t v) { st_word(a, v, kRelaxed); }
inline uint64_t ld_acquire_sys(const uint64_t* a) { return ld_word(a, std::memory_order_acquire); }
inline void st_release_sys(uint64_t* a, uint64_t v) { st_word(a, v, std::memory_order_release); }
inline void fence_sys() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline uint64_t evict_first() { return 0; }
inline void st_relaxed_sys_with_policy(uint4* a, uint4 v, uint64_t) { st_relaxed_sys(a, v); }
inline void sync_before_release() { __syncthreads(); }
inline void sync_warp() {}
inline uint64_t fetch_or_relaxed_gpu(uint64_t* a, uint64_t bits) {
  return std::atomic_ref(*a).fetch_or(bits, kRelaxed);
}
inline uint32_t fetch_add_relaxed_gpu(uint32_t* a, uint32_t amount) {
  return std::atomic_ref(*a).fetch_add(amount, kRelaxed);
}
inline void nap(uint32_t) { std::this_thread::yield(); }
inline uint64_t clock_ns() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}
inline void dependency_wait() {}
inline void launch_dependents() {}

}  // namespace gpu
