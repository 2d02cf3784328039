// Lets Python's signal handlers run while native code waits (Ctrl-C, SIGTERM).
//
// The library is not linked with Python (one binary serves every version), so the few functions
// that are needed, all of Python's limited API, are looked up in the process. Where there is no
// Python there are no handlers to run, and nothing happens.
#pragma once

#include <stdexcept>

namespace shm {

// Thrown after a Python handler raised. The Python exception is kept;
// communicators/bindings/native.py asks for it (communicators_reraise) and raises it in place of
// this one.
class Interrupted : public std::runtime_error {
 public:
  Interrupted() : std::runtime_error("Interrupted: a signal handler raised an exception") {}
};

// Runs the handlers of signals that have arrived, if this is Python's main thread; true if one of
// them raised. Costs about a microsecond: for the end of a sleep, not for a spin.
bool python_handler_raised();

inline void throw_if_interrupted() {
  if (python_handler_raised()) throw Interrupted();
}

}  // namespace shm
