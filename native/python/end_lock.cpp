#include <algorithm>

#include "prim/deadline.h"
#include "prim/futex.h"
#include "python/queue_ends.h"

namespace python {
namespace {

constexpr double kForeverS = 1e9;

End* of(PyObject* self) { return reinterpret_cast<End*>(self); }

// acquire(blocking=True, timeout=-1) -> bool
PyObject* acquire(PyObject* self, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"blocking", "timeout", nullptr};
  int blocking = 1;
  double timeout_s = -1;
  if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|pd", const_cast<char**>(names), &blocking,
                                   &timeout_s)) {
    return nullptr;
  }
  End* end = of(self);
  if (!(timeout_s >= 0 && timeout_s < kForeverS)) timeout_s = kForeverS;
  const auto deadline = prim::Deadline::after_seconds(blocking != 0 ? timeout_s : 0);
  while (!end_lock(end)) {
    const int64_t left_ns = deadline.left_ns();
    if (left_ns <= 0) return Py_NewRef(Py_False);
    const uint32_t seen = prim::load_relaxed(end->releases);
    ++end->waiting;
    Py_BEGIN_ALLOW_THREADS;
    (void)prim::futex_wait(end->releases, seen, std::min(left_ns, kSignalsNs));
    Py_END_ALLOW_THREADS;
    --end->waiting;
    if (PyErr_CheckSignals() != 0) return nullptr;
  }
  return Py_NewRef(Py_True);
}

PyObject* release(PyObject* self, PyObject*) {
  if (!of(self)->held) {
    PyErr_SetString(PyExc_RuntimeError, "release(): the lock is held, and this one is not");
    return nullptr;
  }
  end_unlock(of(self));
  return Py_NewRef(Py_None);
}

PyMethodDef methods[] = {
    {"acquire", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(acquire)),
     METH_VARARGS | METH_KEYWORDS, nullptr},
    {"release", release, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(end_dealloc)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"_native_queue.End", sizeof(End), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                    slots};

}  // namespace

// All that wait are woken, for the first of them may have run out of time, or be interrupted.
void end_unlock(End* end) {
  end->held = false;
  end->releases.fetch_add(1, std::memory_order_relaxed);
  if (end->waiting > 0) prim::futex_wake(end->releases);
}

PyObject* make_end_type() { return PyType_FromSpec(&spec); }

void end_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

bool add_type(PyObject* module, PyObject* end, PyType_Spec* spec, const char* name) {
  PyObject* type = PyType_FromSpecWithBases(spec, end);
  if (type == nullptr) return false;
  const bool added = PyModule_AddObjectRef(module, name, type) == 0;
  Py_DECREF(type);
  return added;
}

}  // namespace python
