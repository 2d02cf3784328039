// The two ends of a ring as Python objects, for the calls that a program makes for every message
// (communicators/message_queue/native_end.py has the other half).
//
// enqueue() and dequeue() of plain data are one call each, which keeps the interpreter's lock and
// runs no Python code, so that no other thread and no signal handler comes in between: they need no
// lock of their own, only to know that no thread is inside of a longer call. Such a call, which may
// wait or run the program's code, holds the end's lock.
#pragma once

#include <Python.h>

namespace python {

// Adds the types WriterEnd and ReaderEnd to the module; false with an exception set.
bool add_writer_end(PyObject* module);
bool add_reader_end(PyObject* module);

// --- what both have in common -------------------------------------------------------------------

struct End {
  PyObject_HEAD;
  PyObject* lock_acquire;
  PyObject* lock_release;
  bool held;  // by a longer call
};

// acquire() and release() of threading.Lock, which note what they do in `held`.
PyObject* end_acquire(PyObject* self, PyObject* arguments, PyObject* keywords);
PyObject* end_release(PyObject* self, PyObject*);

// Takes the lock if it is free; and gives it back.
bool end_lock(End* end);
void end_unlock(End* end);

// Takes the two methods of `lock`; false with an exception set.
bool end_set_lock(End* end, PyObject* lock);
void end_dealloc(End* end);

// Makes the type of `spec`, and puts it into the module under `name`.
bool add_type(PyObject* module, PyType_Spec* spec, const char* name);

}  // namespace python
