// What a call is, in one word that ranks compare at its first step.
#pragma once

#include <cstdint>
#include <string>

#include "prim/dtype.h"

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
  kAllToAll,
  kReduce,
  kScatter,
};

// By what elements of the ranks become one; the numbers of torch's ReduceOp, which are stable.
enum class Reduction : uint32_t {
  kSum = 0,
  kAverage = 1,
  kProduct = 2,
  kMin = 3,
  kMax = 4,
  kAnd = 5,  // of bits
  kOr = 6,
  kXor = 7,
};

struct Signature {
  Op op;
  DType dtype;
  int root;        // or the peer; 0 where there is none
  uint64_t bytes;  // of one rank's contribution
  Reduction reduction = Reduction::kSum;

  uint64_t packed() const {
    return uint64_t{static_cast<uint32_t>(op)} | uint64_t{static_cast<uint32_t>(dtype) & 63} << 4 |
           uint64_t{static_cast<uint32_t>(root) & 63} << 10 |
           uint64_t{static_cast<uint32_t>(reduction)} << 16 | bytes << 19;
  }
  static Signature unpack(uint64_t word) {
    return {static_cast<Op>(word & 15), static_cast<DType>(word >> 4 & 63),
            static_cast<int>(word >> 10 & 63), word >> 19, static_cast<Reduction>(word >> 16 & 7)};
  }
};

const char* name_of(Op op);
const char* name_of(Reduction reduction);
std::string name_of(DType dtype);  // as in Python: "float32"

// "all_reduce of 64 bytes of float32".
std::string describe(uint64_t packed_signature);

}  // namespace shm
