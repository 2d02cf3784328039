// The Python module `_native_queue`: the ends of a MessageQueue's ring, and the codec of plain
// data.
//
// It is compiled for the limited API of Python 3.10 into the CPU library, so that one binary serves
// every later Python, and is found by the name of its PyInit function.
#include <Python.h>

#include <memory>
#include <new>

#include "python/plain_codec.h"
#include "python/queue_ends.h"

namespace python {

namespace {

// encode(obj, room) -> bytes, or None if `obj` is not plain or takes more than `room` bytes.
PyObject* encode(PyObject*, PyObject* arguments) {
  PyObject* object;
  Py_ssize_t room;
  if (!PyArg_ParseTuple(arguments, "On", &object, &room)) return nullptr;
  if (room < 0) return PyErr_Format(PyExc_ValueError, "room=%zd: 0 or more is expected", room);
  std::unique_ptr<std::byte[]> to(new (std::nothrow) std::byte[static_cast<size_t>(room)]);
  if (to == nullptr) return PyErr_NoMemory();
  try {
    const size_t bytes = PlainEncoder().encode(object, to.get(), static_cast<size_t>(room));
    if (bytes == 0) return Py_NewRef(Py_None);
    return PyBytes_FromStringAndSize(reinterpret_cast<char*>(to.get()),
                                     static_cast<Py_ssize_t>(bytes));
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// decode(bytes) -> object. ValueError if they are not what encode() makes.
PyObject* decode(PyObject*, PyObject* stream) {
  char* from;
  Py_ssize_t bytes;
  if (PyBytes_AsStringAndSize(stream, &from, &bytes) != 0) return nullptr;
  try {
    return PlainDecoder().decode(reinterpret_cast<std::byte*>(from), static_cast<size_t>(bytes));
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

PyMethodDef functions[] = {
    {"encode", encode, METH_VARARGS, nullptr},
    {"decode", decode, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

int fill(PyObject* module) {
  if (PyModule_AddStringConstant(module, "version", COMMUNICATORS_VERSION) != 0) return -1;
  PyObject* end = make_end_type();
  if (end == nullptr) return -1;
  const bool filled = add_writer_end(module, end) && add_reader_end(module, end);
  Py_DECREF(end);
  return filled ? 0 : -1;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(fill)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native_queue", nullptr, 0, functions, slots, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace python

PyMODINIT_FUNC PyInit__native_queue() { return PyModuleDef_Init(&python::definition); }
