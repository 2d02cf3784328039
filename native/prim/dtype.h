// The one code of a dtype in native code and in its C interfaces, torch's headers left outside.
#pragma once

#include <cstdint>

// The numbers of torch's ScalarType (torch/headeronly/core/ScalarType.h), which are stable, so that
// nothing is mapped. Data that is only moved may have one that has no name here.
enum class DType : int32_t {
  kUInt8 = 0,
  kInt8 = 1,
  kInt16 = 2,
  kInt32 = 3,
  kInt64 = 4,
  kFloat16 = 5,
  kFloat32 = 6,
  kFloat64 = 7,
  kBool = 11,
  kBFloat16 = 15,
};

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

// Bytes of one element; 0 for a dtype without a name here.
inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kBool:
      return 1;
    case DType::kInt16:
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
    case DType::kInt64:
    case DType::kFloat64:
      return 8;
  }
  return 0;
}
