// Errors that Python raises as a class of communicators/errors.py: the text starts with the class's
// name and ": ", and communicators/bindings/native.py makes the exception of it. The one way in
// which native code, on a CPU or a GPU, says what kind of error it has.
#pragma once

#include <stdexcept>

#include "prim/text.h"

namespace prim {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Raises `kind`, one of errors.py, with this one sentence.
template <class... Parts>
[[noreturn]] void fail(const char* kind, const Parts&... parts) {
  throw Error(text(kind, ": ", parts...));
}

inline constexpr const char* kTimeout = "CommTimeoutError";
inline constexpr const char* kInvalid = "InvalidArgumentError";
inline constexpr const char* kFailed = "CommunicatorError";

// InvalidArgumentError with this sentence, unless `ok`.
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) fail(kInvalid, parts...);
}

}  // namespace prim
