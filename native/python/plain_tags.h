// The first byte of a value, see plain_codec.h.
#pragma once

namespace python {

enum Tag : unsigned char {
  kNone,
  kFalse,
  kTrue,
  kInt8,
  kInt32,
  kInt64,
  kFloat,
  kStr,  // each from here on has a second one with a u32 in place of the u8
  kStr32,
  kBytes,
  kBytes32,
  kList,
  kList32,
  kTuple,
  kTuple32,
  kDict,
  kDict32,
  kNotPlain,
};

}  // namespace python
