#include <cstddef>
#include <cstring>
#include <memory>
#include <new>

#include "python/plain_codec.h"
#include "python/queue_ends.h"
#include "shm/ring.h"

namespace python {
namespace {

struct WriterEnd {
  End end;
  shm::RingWriter* ring;  // null: closed, or in a forked child
  size_t slot_bytes;      // 0: nothing is sent from here (there are readers on other hosts)
  PlainEncoder* encoder;
};

WriterEnd* of(PyObject* self) { return reinterpret_cast<WriterEnd*>(self); }

// kNotApplicable: it is to be pickled. kFull: no slot is free. kBusy: a longer call is under way.
enum Put : long { kNotApplicable, kSent, kFull, kBusy };

// The message is made in the slot itself: until publish() that is the writer's.
Put put(WriterEnd* self, PyObject* object) {
  shm::RingWriter* ring = self->ring;
  if (ring == nullptr) return kNotApplicable;
  // Before anything else: a sleeper's wake-up takes longer than making the message.
  if (ring->somebody_sleeps()) ring->nudge();
  if (self->slot_bytes == 0) return kNotApplicable;
  if (!ring->has_slot_soon()) return kFull;
  const size_t bytes = self->encoder->encode(object, ring->slot_payload(), self->slot_bytes);
  if (bytes == 0) return kNotApplicable;
  ring->publish(shm::SlotKind::kInline, bytes);
  return kSent;
}

// try_put(obj) -> int: SENT in the usual case, where the data is plain, a slot is free, and no
// thread is inside; else why not. Needs no lock.
PyObject* try_put(PyObject* self, PyObject* object) {
  return PyLong_FromLong(of(self)->end.held ? kBusy : put(of(self), object));
}

// put(obj) -> int, with the lock held.
PyObject* put_locked(PyObject* self, PyObject* object) {
  return PyLong_FromLong(put(of(self), object));
}

// put_pickle(bytes) -> bool, with the lock held: whether it was sent.
PyObject* put_pickle(PyObject* self, PyObject* stream) {
  shm::RingWriter* ring = of(self)->ring;
  char* from;
  Py_ssize_t bytes;
  if (PyBytes_AsStringAndSize(stream, &from, &bytes) != 0) return nullptr;
  if (ring == nullptr || static_cast<size_t>(bytes) > of(self)->slot_bytes ||
      !ring->has_slot_soon()) {
    return Py_NewRef(Py_False);
  }
  std::memcpy(ring->slot_payload(), from, static_cast<size_t>(bytes));
  ring->publish(shm::SlotKind::kInline, static_cast<uint64_t>(bytes));
  return Py_NewRef(Py_True);
}

// detach(): the ring is not to be touched any more.
PyObject* detach(PyObject* self, PyObject*) {
  of(self)->ring = nullptr;
  return Py_NewRef(Py_None);
}

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) {
  unsigned long long handle, slot_bytes;
  if (!PyArg_ParseTuple(arguments, "KK", &handle, &slot_bytes)) return nullptr;
  PyObject* made = PyType_GenericAlloc(type, 0);
  if (made == nullptr) return nullptr;
  of(made)->ring = reinterpret_cast<shm::RingWriter*>(handle);
  of(made)->slot_bytes = static_cast<size_t>(slot_bytes);
  try {
    of(made)->encoder = new PlainEncoder();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  if (of(made)->encoder == nullptr) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

void dealloc(PyObject* self) {
  delete of(self)->encoder;
  end_dealloc(self);
}

PyMethodDef methods[] = {
    {"try_put", try_put, METH_O, nullptr},
    {"put", put_locked, METH_O, nullptr},
    {"put_pickle", put_pickle, METH_O, nullptr},
    {"detach", detach, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"_native_queue.WriterEnd", sizeof(WriterEnd), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

bool add_writer_end(PyObject* module, PyObject* end) {
  return add_type(module, end, &spec, "WriterEnd");
}

}  // namespace python
