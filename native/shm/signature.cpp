#include "shm/signature.h"

#include <iterator>

namespace shm {

const char* name_of(Op op) {
  static constexpr const char* kNames[] = {
      "barrier", "all_reduce", "all_gather", "reduce_scatter", "gather", "broadcast",
      "send",    "recv",       "all_to_all", "reduce",         "scatter"};
  const auto i = static_cast<uint32_t>(op);
  return i < std::size(kNames) ? kNames[i] : "an unknown op";
}

const char* name_of(Reduction reduction) {
  static constexpr const char* kNames[] = {"sum", "avg",  "product", "min",
                                           "max", "band", "bor",     "bxor"};
  return kNames[static_cast<uint32_t>(reduction) & 7];
}

std::string name_of(DType dtype) {
  static constexpr const char* kNames[] = {
      "uint8",     "int8",      "int16",      "int32", "int64", "float16", "float32", "float64",
      "complex32", "complex64", "complex128", "bool",  "qint8", "quint8",  "qint32",  "bfloat16"};
  const auto i = static_cast<uint32_t>(dtype);
  return i < std::size(kNames) ? kNames[i] : "dtype " + std::to_string(i);
}

std::string describe(uint64_t packed_signature) {
  const Signature call = Signature::unpack(packed_signature);
  std::string text = name_of(call.op);
  if (call.op == Op::kBarrier) return text;
  if (call.reduction != Reduction::kSum) text += std::string(" by ") + name_of(call.reduction);
  // How much an all_to_all moves between whom is compared in its first step.
  text += call.op == Op::kAllToAll ? std::string(" of ")
                                   : " of " + std::to_string(call.bytes) + " bytes of ";
  text += name_of(call.dtype);
  const std::string rank = "rank " + std::to_string(call.root);
  switch (call.op) {
    case Op::kGather:
    case Op::kReduce:
    case Op::kSend:
      return text + " to " + rank;
    case Op::kBroadcast:
    case Op::kScatter:
    case Op::kRecv:
      return text + " from " + rank;
    default:
      return text;
  }
}

}  // namespace shm
