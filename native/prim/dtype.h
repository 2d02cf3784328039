// The dtypes that the ops' launch functions are told about, torch's left outside.
#pragma once

#include <cstdint>

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kByte };

// Marks a function that device code calls too.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define ON_BOTH_SIDES __host__ __device__
#else
#define ON_BOTH_SIDES
#endif

// How a cache entry is stored: a copy, or OCP fp8 values.
enum class KvFormat : int32_t { kCopy, kE4M3, kE5M2 };

// The stream that work is queued on; null for the CPU, where a launch function returns when done.
using Stream = void*;

inline int64_t size_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kByte ? 1 : 2;
}
