// Two ways in which data is its own arrival flag, so that no fence, flag or barrier follows it.
//
// Lamport vectors (sums): a slot at rest holds kEmpty in every 32-bit word. The sender replaces a
// word that happens to be kEmpty by another NaN; the reader has a word as soon as it is not kEmpty,
// and writes kEmpty back. kEmpty is a NaN in fp32 and two NaNs in fp16 and bf16, and a sum with a
// NaN is the one canonical NaN on these GPUs, so no result can tell the difference. The bytes are
// those of the data. The technique is FlashInfer's and TensorRT-LLM's "lamport" all-reduce, with
// their -0.0 replaced by a NaN, which needs no restoring.
//
// LL packets (copies, which must keep every bit): 4 bytes of data travel with 4 bytes of epoch in
// one 64-bit store, as in NCCL's LL protocol. Twice the bytes, no reserved value.
#pragma once

#include <cstdint>

#include "prim/gpu_memory.h"

namespace gpu {

inline constexpr uint32_t kEmpty = 0xffffffffu;
inline constexpr uint32_t kEmptyStandIn = 0xfffffffeu;

__device__ __forceinline__ bool is_empty(uint4 v) {
  return v.x == kEmpty || v.y == kEmpty || v.z == kEmpty || v.w == kEmpty;
}

__device__ __forceinline__ uint32_t without_empty(uint32_t word) {
  return word == kEmpty ? kEmptyStandIn : word;
}

__device__ __forceinline__ uint4 without_empty(uint4 v) {
  return make_uint4(without_empty(v.x), without_empty(v.y), without_empty(v.z), without_empty(v.w));
}

__device__ __forceinline__ void send_lamport(uint4* slot, uint4 value) {
  st_relaxed_sys(slot, without_empty(value));
}

__device__ __forceinline__ void clear_lamport(uint4* slot) {
  st_relaxed_sys(slot, make_uint4(kEmpty, kEmpty, kEmpty, kEmpty));
}

__device__ __forceinline__ void clear_lamport(uint4* slot, uint64_t policy) {
  st_relaxed_sys_with_policy(slot, make_uint4(kEmpty, kEmpty, kEmpty, kEmpty), policy);
}

// Two packets in one 16-byte store.
__device__ __forceinline__ void send_ll(ulonglong2* slot, uint2 data, uint32_t tag) {
  const uint64_t high = static_cast<uint64_t>(tag) << 32;
  st_relaxed_sys(slot, make_ulonglong2(high | data.x, high | data.y));
}

__device__ __forceinline__ bool has_tag(ulonglong2 packets, uint32_t tag) {
  return static_cast<uint32_t>(packets.x >> 32) == tag &&
         static_cast<uint32_t>(packets.y >> 32) == tag;
}

__device__ __forceinline__ uint2 ll_data(ulonglong2 packets) {
  return make_uint2(static_cast<uint32_t>(packets.x), static_cast<uint32_t>(packets.y));
}

}  // namespace gpu
