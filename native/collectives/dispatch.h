// From run-time dtype and world size to template arguments.
#pragma once

#include <stdexcept>

#include "collectives/collectives.h"
#include "prim/gpu_vec.h"

namespace collectives {

template <typename T>
struct Type {
  using type = T;
};
template <int N>
struct Number {
  static constexpr int value = N;
};

template <typename Body>
void by_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat16:
      return body(Type<gpu::Half>{});
    case DType::kBFloat16:
      return body(Type<gpu::BFloat16>{});
    default:
      break;
  }
  throw std::runtime_error("the sums are of float32, float16 or bfloat16");
}

template <typename Body>
void by_world(uint32_t world, Body body) {
  switch (world) {
    case 2:
      return body(Number<2>{});
    case 4:
      return body(Number<4>{});
    case 6:
      return body(Number<6>{});
    case 8:
      return body(Number<8>{});
  }
  throw std::runtime_error("the world size is 2, 4, 6 or 8");
}

inline uint64_t vectors_of(uint64_t bytes) {
  return (bytes + gpu::kVectorBytes - 1) / gpu::kVectorBytes;
}

inline int at_most(uint64_t wanted, uint64_t limit) {
  const uint64_t some = wanted < limit ? wanted : limit;
  return static_cast<int>(some > 0 ? some : 1);
}

}  // namespace collectives
