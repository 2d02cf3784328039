#include "shm/signature.h"

#include <iterator>

namespace shm {

const char* name_of(Op op) {
  static constexpr const char* kNames[] = {"barrier", "all_reduce", "all_gather", "reduce_scatter",
                                           "gather",  "broadcast",  "send",       "recv"};
  const auto i = static_cast<uint32_t>(op);
  return i < std::size(kNames) ? kNames[i] : "an unknown op";
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
  text += " of " + std::to_string(call.bytes) + " bytes of " + name_of(call.dtype);
  const std::string rank = "rank " + std::to_string(call.root);
  if (call.op == Op::kGather) text += " to " + rank;
  if (call.op == Op::kSend) text += " to " + rank;
  if (call.op == Op::kBroadcast || call.op == Op::kRecv) text += " from " + rank;
  return text;
}

}  // namespace shm
