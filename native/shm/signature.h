// What a call is, in one word that ranks compare at its first step.
#pragma once

#include <cstdint>
#include <string>

namespace shm {

enum class Op : uint32_t {
  kBarrier,
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kGather,
  kBroadcast,
  kSend,
  kRecv,
};

// The numbers of torch's ScalarType (torch/headeronly/core/ScalarType.h), which are stable.
enum class DType : uint32_t {
  kU8 = 0,
  kI8 = 1,
  kI16 = 2,
  kI32 = 3,
  kI64 = 4,
  kF16 = 5,
  kF32 = 6,
  kF64 = 7,
  kBF16 = 15,
};

struct Signature {
  Op op;
  DType dtype;
  int root;        // or the peer; 0 where there is none
  uint64_t bytes;  // of one rank's contribution

  uint64_t packed() const {
    return uint64_t{static_cast<uint32_t>(op)} | uint64_t{static_cast<uint32_t>(dtype) & 63} << 4 |
           uint64_t{static_cast<uint32_t>(root) & 127} << 10 | bytes << 17;
  }
  static Signature unpack(uint64_t word) {
    return {static_cast<Op>(word & 15), static_cast<DType>(word >> 4 & 63),
            static_cast<int>(word >> 10 & 127), word >> 17};
  }
};

const char* name_of(Op op);
std::string name_of(DType dtype);  // as in Python: "float32"

// "all_reduce of 64 bytes of float32".
std::string describe(uint64_t packed_signature);

}  // namespace shm
