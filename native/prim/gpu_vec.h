// 16 bytes of fp32, fp16 or bf16: load and store at any alignment and up to any end, and sums in
// fp32 with one rounding.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "prim/gpu_half.h"
#include "prim/gpu_memory.h"

namespace gpu {

inline constexpr uint32_t kVectorBytes = 16;

// The elements of a 16-byte vector as floats.
template <typename T>
struct Floats;

template <>
struct Floats<float> {
  float x[4];
  __device__ __forceinline__ explicit Floats(uint4 v)
      : x{std::bit_cast<float>(v.x), std::bit_cast<float>(v.y), std::bit_cast<float>(v.z),
          std::bit_cast<float>(v.w)} {}
  __device__ __forceinline__ uint4 rounded() const {
    return make_uint4(std::bit_cast<uint32_t>(x[0]), std::bit_cast<uint32_t>(x[1]),
                      std::bit_cast<uint32_t>(x[2]), std::bit_cast<uint32_t>(x[3]));
  }
};

template <>
struct Floats<Half> {
  float x[8];
  __device__ __forceinline__ explicit Floats(uint4 v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen_halves(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
  __device__ __forceinline__ uint4 rounded() const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = round_to_halves(x[2 * i], x[2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <>
struct Floats<BFloat16> {
  float x[8];
  __device__ __forceinline__ explicit Floats(uint4 v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = std::bit_cast<float>(words[i] << 16);
      x[2 * i + 1] = std::bit_cast<float>(words[i] & 0xffff0000u);
    }
  }
  __device__ __forceinline__ uint4 rounded() const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = round_to_bfloat16s(x[2 * i], x[2 * i + 1]);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

// sum += other, element by element; no contraction with what stands around it.
template <typename T>
__device__ __forceinline__ void accumulate(Floats<T>& sum, const Floats<T>& other) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(kVectorBytes / sizeof(T)); ++i) {
    sum.x[i] = __fadd_rn(sum.x[i], other.x[i]);
  }
}

// a + b, element by element, summed in fp32 and rounded once. Commutes in every bit.
template <typename T>
__device__ __forceinline__ uint4 sum_of_two(uint4 a, uint4 b) {
#if COMMUNICATORS_PACKED_SUMS
  if constexpr (std::is_same_v<T, Half>) {
    return make_uint4(add_halves(a.x, b.x), add_halves(a.y, b.y), add_halves(a.z, b.z),
                      add_halves(a.w, b.w));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return make_uint4(add_bfloat16s(a.x, b.x), add_bfloat16s(a.y, b.y), add_bfloat16s(a.z, b.z),
                      add_bfloat16s(a.w, b.w));
  }
#endif
  Floats<T> sum(a);
  accumulate(sum, Floats<T>(b));
  return sum.rounded();
}

// A tensor's memory as vectors of 16 bytes. The address need only be aligned to an element and the
// size be whole elements: then, and in the last vector, elements are moved one by one.
// With kWhole the caller promises an aligned address and whole vectors.
template <typename Element, bool kWhole = false>
struct Span {
  char* data;
  uint64_t bytes;
  bool aligned;

  __host__ __device__ Span(const void* pointer, uint64_t size)
      : data(static_cast<char*>(const_cast<void*>(pointer))),
        bytes(size),
        aligned((reinterpret_cast<uintptr_t>(pointer) & (kVectorBytes - 1)) == 0) {}

  __device__ __forceinline__ bool whole(uint64_t vector) const {
    return kWhole || (aligned && (vector + 1) * kVectorBytes <= bytes);
  }

  __host__ bool all_whole() const { return aligned && bytes % kVectorBytes == 0; }

  // Vector number `vector`; zeros where it reaches past the end.
  __device__ __forceinline__ uint4 load(uint64_t vector) const {
    const char* at = data + vector * kVectorBytes;
    if (whole(vector)) return *reinterpret_cast<const uint4*>(at);
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < static_cast<int>(kVectorBytes / sizeof(Element)); ++i) {
      if (vector * kVectorBytes + i * sizeof(Element) < bytes) {
        const uint32_t bits = reinterpret_cast<const Element*>(at)[i];
        words[i * sizeof(Element) / 4] |= bits << (i * sizeof(Element) % 4 * 8);
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  __device__ __forceinline__ void store(uint64_t vector, uint4 value) const {
    char* at = data + vector * kVectorBytes;
    if (whole(vector)) {
      *reinterpret_cast<uint4*>(at) = value;
      return;
    }
    const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < static_cast<int>(kVectorBytes / sizeof(Element)); ++i) {
      if (vector * kVectorBytes + i * sizeof(Element) < bytes) {
        reinterpret_cast<Element*>(at)[i] =
            static_cast<Element>(words[i * sizeof(Element) / 4] >> (i * sizeof(Element) % 4 * 8));
      }
    }
  }
};

// The unsigned integer that holds one element's bits.
template <typename T>
struct BitsOf {
  using type = uint16_t;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <typename T, bool kWhole = false>
using SpanOf = Span<typename BitsOf<T>::type, kWhole>;

}  // namespace gpu
