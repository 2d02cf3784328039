// How an operator raises, and how that reaches torch.
//
// A library may carry a C++ runtime of its own (-static-libstdc++, libc++) beside torch's. So no
// exception of ours enters torch's frames, where it would have to be recognised by another
// runtime's types: it ends in boxed(), and torch throws its own with the same text.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <exception>
#include <stdexcept>
#include <string>

#include "prim/text.h"

namespace torch_glue {

// Raises RuntimeError with this one sentence.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error(prim::text(parts...));
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

using Boxed = void (*)(StableIValue* stack, uint64_t arguments, uint64_t results);

inline void call(Boxed op, StableIValue* stack, uint64_t arguments, uint64_t results) {
  // Not a local: torch's exception passes this frame, which then has nothing to destroy.
  static thread_local std::string sentence;
  try {
    return op(stack, arguments, results);
  } catch (const std::exception& error) {
    sentence = error.what();
  } catch (...) {
    sentence = "an exception of an unknown type";
  }
  aoti_torch_check(false, "", "", 0, sentence.c_str());
}

// `op` in the form that torch calls.
template <auto op>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
  call(TORCH_BOX(op), stack, arguments, results);
}

}  // namespace torch_glue
