// Thread block clusters (sm_90 on): blocks of one launch that run at the same time and can write
// into each other's shared memory. An inbox is a place there with a barrier of its own, which opens
// when all bytes that are expected have come. It is used once a launch:
//   open_inbox() by one thread, arrive_in_cluster() by all, wait_for_cluster() by all, then sends
//   by anybody; wait_for_inbox() by all readers. A block ends after its inbox is full, so that
//   nobody sends to a block that is gone.
#pragma once

#include <cstdint>

#include "prim/gpu.h"

#if !COMMUNICATORS_HIP
namespace gpu {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void open_inbox(uint64_t* barrier, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared.b64 [%0], 1;"
      " fence.mbarrier_init.release.cluster;"
      " mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// A barrier of all threads of the cluster, in two halves.
__device__ __forceinline__ void arrive_in_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Writes *to of block `block` of the cluster; `to` and `barrier` are this block's own addresses.
__device__ __forceinline__ void send(float* to, uint64_t* barrier, uint32_t block, float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 to, bar; mapa.shared::cluster.u32 to, %0, %2;"
      " mapa.shared::cluster.u32 bar, %1, %2;"
      " st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [bar];}" ::"r"(
          shared_address(to)),
      "r"(shared_address(barrier)), "r"(block), "r"(__float_as_uint(value))
      : "memory");
#endif
}

// Needs no deadline: the other blocks run already, and what they send waits for nothing else.
__device__ __forceinline__ void wait_for_inbox(uint64_t* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t full = 0;
  while (full == 0) {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;"
        " selp.u32 %0, 1, 0, p;}"
        : "=r"(full)
        : "r"(shared_address(barrier))
        : "memory");
  }
#endif
}

}  // namespace gpu
#endif
