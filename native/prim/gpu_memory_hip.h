// The HIP counterparts of gpu_memory.h: the same names and the same orders, in the compiler's
// scoped atomics. "sys" is the system scope, "gpu" the agent's. Never executed so far: there is no
// AMD GPU to run them on; scripts/check_rocm compiles them and looks at what they became.
#pragma once

#include <cstdint>

#include "prim/gpu.h"

namespace gpu {

__device__ __forceinline__ uint16_t ld_relaxed_sys(const uint16_t* address) {
  return __hip_atomic_load(address, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}

__device__ __forceinline__ void st_relaxed_sys(uint16_t* address, uint16_t value) {
  __hip_atomic_store(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}

__device__ __forceinline__ uint32_t ld_relaxed_sys(const uint32_t* address) {
  return __hip_atomic_load(address, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}

__device__ __forceinline__ uint64_t ld_relaxed_sys(const uint64_t* address) {
  return __hip_atomic_load(address, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}

__device__ __forceinline__ void st_relaxed_sys(uint32_t* address, uint32_t value) {
  __hip_atomic_store(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}

__device__ __forceinline__ void st_relaxed_sys(uint64_t* address, uint64_t value) {
  __hip_atomic_store(address, value, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_SYSTEM);
}

// 16 bytes as two whole words of 64 bits.
__device__ __forceinline__ uint4 ld_relaxed_sys(const uint4* address) {
  const auto* halves = reinterpret_cast<const uint64_t*>(address);
  const uint64_t low = ld_relaxed_sys(halves);
  const uint64_t high = ld_relaxed_sys(halves + 1);
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                    static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
}

__device__ __forceinline__ void st_relaxed_sys(uint4* address, uint4 value) {
  auto* halves = reinterpret_cast<uint64_t*>(address);
  st_relaxed_sys(halves, value.x | static_cast<uint64_t>(value.y) << 32);
  st_relaxed_sys(halves + 1, value.z | static_cast<uint64_t>(value.w) << 32);
}

__device__ __forceinline__ ulonglong2 ld_relaxed_sys(const ulonglong2* address) {
  const auto* halves = reinterpret_cast<const uint64_t*>(address);
  return make_ulonglong2(ld_relaxed_sys(halves), ld_relaxed_sys(halves + 1));
}

__device__ __forceinline__ void st_relaxed_sys(ulonglong2* address, ulonglong2 value) {
  auto* halves = reinterpret_cast<uint64_t*>(address);
  st_relaxed_sys(halves, static_cast<uint64_t>(value.x));
  st_relaxed_sys(halves + 1, static_cast<uint64_t>(value.y));
}

__device__ __forceinline__ uint64_t ld_acquire_sys(const uint64_t* address) {
  return __hip_atomic_load(address, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_SYSTEM);
}

__device__ __forceinline__ void st_release_sys(uint64_t* address, uint64_t value) {
  __hip_atomic_store(address, value, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_SYSTEM);
}

__device__ __forceinline__ void fence_sys() { __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, ""); }

// A barrier of the block after which one thread may release what all of them have stored. A release
// waits for the stores of its own wavefront alone, so each thread waits for its own.
__device__ __forceinline__ void sync_before_release() {
  fence_sys();
  __syncthreads();
}

// The lanes of a wavefront share one program counter; nothing moves across this.
__device__ __forceinline__ void sync_warp() { __builtin_amdgcn_wave_barrier(); }

__device__ __forceinline__ uint64_t fetch_or_relaxed_gpu(uint64_t* address, uint64_t bits) {
  return __hip_atomic_fetch_or(address, bits, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

__device__ __forceinline__ uint32_t fetch_add_relaxed_gpu(uint32_t* address, uint32_t amount) {
  return __hip_atomic_fetch_add(address, amount, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

// The real-time counter of these GPUs runs at 100 MHz.
__device__ __forceinline__ uint64_t clock_ns() { return __builtin_readsteadycounter() * 10; }

// About 64 cycles, whatever was asked for.
__device__ __forceinline__ void nap(uint32_t) { __builtin_amdgcn_s_sleep(1); }

__device__ __forceinline__ void dependency_wait() {}
__device__ __forceinline__ void launch_dependents() {}

// There is no L2 eviction policy to set.
__device__ __forceinline__ uint64_t evict_first() { return 0; }
__device__ __forceinline__ void st_relaxed_sys_with_policy(uint4* address, uint4 value, uint64_t) {
  st_relaxed_sys(address, value);
}

}  // namespace gpu
