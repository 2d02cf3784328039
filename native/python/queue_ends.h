// The two ends of a ring as Python objects, for the calls that a program makes for every message
// (communicators/message_queue/native_end.py has the other half).
//
// enqueue() and dequeue() of plain data are one call each, which keeps the interpreter's lock and
// runs no Python code, so that no other thread and no signal handler comes in between: they need no
// lock of their own, only to know that no thread is inside of a longer call. Such a call, which may
// wait or run the program's code, holds the end's lock.
#pragma once

#include <Python.h>

#include <cstdint>

#include "prim/atomic.h"

namespace python {

// A wait comes back so often, for the handlers of signals that another thread of the process took.
inline constexpr int64_t kSignalsNs = 500'000'000;

// What both ends have in common: a lock. Not one of Python's: between a message's arrival and the
// program that waits for it, giving one back was 5 of 100 us. All but the sleep of a thread that
// waits for it happens with the interpreter's lock held.
struct End {
  PyObject_HEAD;
  bool held;
  uint32_t waiting;          // threads in acquire()
  prim::AtomicU32 releases;  // what they sleep on
};

// Takes the lock if it is free; and gives it back.
inline bool end_lock(End* end) {
  if (end->held) return false;
  return end->held = true;
}
void end_unlock(End* end);

// The type of both, with acquire() and release() as those of threading.Lock. Null with an exception
// set.
PyObject* make_end_type();
// Frees an end, for the types made from that one.
void end_dealloc(PyObject* self);

// Add the types WriterEnd and ReaderEnd, made from `end`, to the module; false with an exception
// set.
bool add_writer_end(PyObject* module, PyObject* end);
bool add_reader_end(PyObject* module, PyObject* end);

// Makes the type of `spec` from `end`, and puts it into the module under `name`.
bool add_type(PyObject* module, PyObject* end, PyType_Spec* spec, const char* name);

}  // namespace python
