// Device-side memory accesses whose names say their ordering and scope, the clock, and programmatic
// dependent launch.
//   relaxed   no ordering with other accesses; each word of 16, 32 or 64 bits is read or written
//             whole
//   release   everything that this thread did before is seen by whoever acquires the value
//   acquire   the counterpart
//   sys       the scope: this GPU, its peers and the host; gpu: this GPU alone
#pragma once

#include <cstdint>

#include "prim/gpu.h"

#if COMMUNICATORS_HIP
#include "prim/gpu_memory_hip.h"
#else

namespace gpu {

__device__ __forceinline__ uint4 ld_relaxed_sys(const uint4* address) {
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ void st_relaxed_sys(uint4* address, uint4 value) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ ulonglong2 ld_relaxed_sys(const ulonglong2* address) {
  ulonglong2 value;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(value.x), "=l"(value.y)
               : "l"(address));
  return value;
}

__device__ __forceinline__ void st_relaxed_sys(ulonglong2* address, ulonglong2 value) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(value.x),
               "l"(value.y)
               : "memory");
}

__device__ __forceinline__ uint16_t ld_relaxed_sys(const uint16_t* address) {
  uint16_t value;
  asm volatile("ld.relaxed.sys.global.u16 %0, [%1];" : "=h"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ void st_relaxed_sys(uint16_t* address, uint16_t value) {
  asm volatile("st.relaxed.sys.global.u16 [%0], %1;" ::"l"(address), "h"(value) : "memory");
}

__device__ __forceinline__ uint32_t ld_relaxed_sys(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ void st_relaxed_sys(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void st_relaxed_sys(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void st_release_sys(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ void fence_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// A barrier of the block after which one thread may release what all of them have stored: releases
// are cumulative in PTX's memory model. On AMD GPUs more is needed (gpu_memory_hip.h).
__device__ __forceinline__ void sync_before_release() { __syncthreads(); }

// Lanes that diverged go on together.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Sets bits of a word of this GPU and returns what it held before.
__device__ __forceinline__ uint64_t fetch_or_relaxed_gpu(uint64_t* address, uint64_t bits) {
  uint64_t before;
  asm volatile("atom.or.relaxed.gpu.global.b64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(address), "l"(bits)
               : "memory");
  return before;
}

// Past the L1, and the compiler leaves them where they stand: plain loads it may put behind a
// branch.
__device__ __forceinline__ int32_t ld_relaxed_gpu(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ int64_t ld_relaxed_gpu(const int64_t* address) {
  int64_t value;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ uint4 ld_relaxed_gpu(const uint4* address) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ uint32_t fetch_add_relaxed_gpu(uint32_t* address, uint32_t amount) {
  uint32_t before;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(address), "r"(amount)
               : "memory");
  return before;
}

// Nanoseconds of a clock that all multiprocessors share; about a microsecond fine.
__device__ __forceinline__ uint64_t clock_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Sleeps for up to twice as many nanoseconds.
__device__ __forceinline__ void nap(uint32_t ns) { __nanosleep(ns); }

// The L2 evict-first policy, for stores to lines that are not read again soon.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void st_relaxed_sys_with_policy(uint4* address, uint4 value,
                                                           uint64_t policy) {
  asm volatile(
      "st.relaxed.sys.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "l"(policy)
      : "memory");
}

// Programmatic dependent launch (sm_90 on; nothing before): a kernel launched with it may start
// while its predecessor in the stream still runs. dependency_wait() returns when the predecessor
// has ended and its writes are visible; launch_dependents() lets the successor start.
__device__ __forceinline__ void dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Prefetches a line into the L2. Nothing is read, so it may stand before dependency_wait().
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// The same for `bytes` bytes, both a multiple of 16.
__device__ __forceinline__ void prefetch_range(const void* address, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
#endif
}

// Prefetch distance in bytes of a kernel that streams through memory: reads come in longer bursts
// between the writes. With less a load finds its line still on its way, with more the lines are
// evicted from the L2 before they are read (H200).
inline constexpr int64_t kAheadBytes = 3 << 20;

// Before dependency_wait(): what the first blocks of a large grid will read is prefetched into the
// L2 while the predecessor ends. Later blocks would prefetch twice, a small grid has no time to
// gain.
__device__ __forceinline__ bool starts_early() { return gridDim.x > 64 && blockIdx.x < 1024; }
__device__ __forceinline__ void prefetch_early(const void* address) {
  if (starts_early()) prefetch(address);
}

// First line of a kernel that is launched by programmatic dependent launch (launch_overlapped());
// or the two halves of it, with work on the arguments alone between them. The successor's blocks
// become resident as this kernel's last ones end, and wait in their turn.
__device__ __forceinline__ void begin_overlapped() {
  launch_dependents();
  dependency_wait();
}

// Memory that a kernel touches once: L1 no-allocate loads, evict-first stores. They keep their
// order among each other and after begin_overlapped().
__device__ __forceinline__ uint4 ld_once(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ uint2 ld_once(const uint2* address) {
  uint2 value;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(address));
  return value;
}

// One word, and the 256 bytes around it into the L2: blocks nearby read the rest.
__device__ __forceinline__ float ld_with_neighbours(const float* address) {
  float value;
  asm volatile("ld.global.L2::256B.f32 %0, [%1];" : "=f"(value) : "l"(address));
  return value;
}

__device__ __forceinline__ void st_once(uint4* address, uint4 value) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

__device__ __forceinline__ void st_once(uint2* address, uint2 value) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(value.x), "r"(value.y)
               : "memory");
}

}  // namespace gpu

#endif  // COMMUNICATORS_HIP
