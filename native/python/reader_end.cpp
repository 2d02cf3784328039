#include <algorithm>
#include <cstddef>
#include <new>

#include "prim/deadline.h"
#include "python/plain_codec.h"
#include "python/queue_ends.h"
#include "shm/ring.h"

namespace python {
namespace {

struct ReaderEnd {
  End end;
  shm::RingReader* ring;  // null: closed, or in a forked child
  PyObject* loads;        // of pickle
  PyObject* wrap_error;   // from what loads() raised, what dequeue() raises
  PyObject* nothing;      // what get() returns, if it returns no message
  int writer;             // pidfd
  double timeout_s;       // where the caller gives none
  PlainDecoder* decoder;
  uint32_t next;  // of the messages in ring->taken() that were copied
};

// In this thread's last get().
thread_local int64_t waited_ns;

ReaderEnd* of(PyObject* self) { return reinterpret_cast<ReaderEnd*>(self); }

// What look() and receive() say beside shm::WaitResult.
enum Look : int { kMessage = static_cast<int>(shm::WaitResult::kReady), kInPlace = 6, kEmpty = 7 };

// The next message of enqueue(). Looking at it twice is no harm: used_up() ends it.
struct Message {
  const std::byte* from;
  size_t bytes;
  bool in_slot;
};

// `soon`: after a spin of some microseconds if there is nothing yet.
Look look(ReaderEnd* self, bool soon, Message& message) {
  const shm::RingReader::Taken& taken = *self->ring->taken();
  if (self->next >= taken.copied) {
    if (soon ? !self->ring->take_soon() : !self->ring->take()) return kEmpty;
    self->next = 0;
  }
  if (taken.copied > 0) {
    const uint32_t begin = self->next == 0 ? 0 : taken.ends[self->next - 1];
    message = {taken.bytes + begin, taken.ends[self->next] - begin, false};
    return kMessage;
  }
  if (taken.kind != shm::SlotKind::kInline) return kInPlace;
  message = {self->ring->at(taken.offset), taken.size, true};
  return kMessage;
}

void used_up(ReaderEnd* self, const Message& message) {
  if (self->ring == nullptr) return;  // closed by what ran while it was unpickled
  if (message.in_slot) {
    self->ring->done();
  } else {
    ++self->next;
  }
}

bool is_pickle(const Message& message) {
  return message.bytes > 0 && message.from[0] == std::byte{kPickleBegin};
}

// PyBUF_READ, which the headers of the limited API have from Python 3.11 on.
constexpr int kReadOnly = 0x100;

PyObject* unpickle(ReaderEnd* self, const Message& message) {
  auto* from = const_cast<char*>(reinterpret_cast<const char*>(message.from));
  PyObject* view = PyMemoryView_FromMemory(from, static_cast<Py_ssize_t>(message.bytes), kReadOnly);
  if (view == nullptr) return nullptr;
  PyObject* decoded = PyObject_CallFunctionObjArgs(self->loads, view, nullptr);
  Py_DECREF(view);
  return decoded;
}

// Raises what the program is to see in place of the exception that is set, which becomes its cause.
void raise_wrapped(ReaderEnd* self) {
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyErr_NormalizeException(&type, &value, &traceback);
  if (traceback != nullptr) PyException_SetTraceback(value, traceback);
  PyObject* wrapped = PyObject_CallFunctionObjArgs(self->wrap_error, value, nullptr);
  if (wrapped != nullptr) {
    PyException_SetCause(wrapped, Py_NewRef(value));
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(wrapped)), wrapped);
    Py_DECREF(wrapped);
  }
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(traceback);
}

// The object. Null with an exception set: the message is used up then, unless that is Ctrl-C: then
// it is still the next one. A pickle needs the lock.
PyObject* open_message(ReaderEnd* self, const Message& message) {
  PyObject* object = is_pickle(message) ? unpickle(self, message)
                                        : self->decoder->decode(message.from, message.bytes);
  if (object == nullptr && PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) return nullptr;
  used_up(self, message);
  if (object == nullptr && PyErr_ExceptionMatches(PyExc_Exception)) raise_wrapped(self);
  return object;
}

// How long to wait, from the argument of dequeue(); 0 also if that is not what is expected.
int64_t nanoseconds(const ReaderEnd* self, PyObject* timeout) {
  const double seconds = timeout == Py_None ? self->timeout_s : PyFloat_AsDouble(timeout);
  if (PyErr_Occurred()) PyErr_Clear();
  if (!(seconds > 0)) return 0;
  return seconds < 1e9 ? static_cast<int64_t>(seconds * 1e9) : int64_t{1'000'000'000'000'000'000};
}

// Waits, with the lock held. Null without an exception: the longer way is to find out what
// happened.
PyObject* wait_and_open(ReaderEnd* self, int64_t timeout_ns) {
  const auto deadline = prim::Deadline::after_ns(timeout_ns);
  for (bool again = false; self->ring != nullptr; again = true) {
    Message message;
    const Look found = look(self, false, message);
    if (found != kEmpty) return found == kMessage ? open_message(self, message) : nullptr;
    shm::RingReader* ring = self->ring;
    const int64_t left_ns = deadline.left_ns();
    shm::WaitResult result;
    Py_BEGIN_ALLOW_THREADS;
    result = ring->wait(std::min(left_ns, kSignalsNs), again, self->writer);
    Py_END_ALLOW_THREADS;
    if (result == shm::WaitResult::kReady) continue;
    if (PyErr_CheckSignals() != 0) return nullptr;
    const bool may_go_on =
        result == shm::WaitResult::kTimedOut || result == shm::WaitResult::kInterrupted;
    if (!may_go_on || deadline.passed()) return nullptr;
  }
  return nullptr;
}

// get(timeout) -> the next object, in the usual case: it is in the ring or comes in time, small,
// and no thread is inside. Plain data that is there already needs no lock.
PyObject* get(PyObject* object, PyObject* timeout) {
  ReaderEnd* self = of(object);
  waited_ns = 0;
  if (self->ring == nullptr || self->end.held) return Py_NewRef(self->nothing);
  Message message;
  PyObject* opened = nullptr;
  const Look found = look(self, true, message);
  if (found == kMessage && !is_pickle(message)) return open_message(self, message);
  const int64_t timeout_ns = found == kEmpty ? nanoseconds(self, timeout) : 0;
  if ((found == kMessage || timeout_ns > 0) && end_lock(&self->end)) {
    const int64_t began = prim::monotonic_ns();
    opened = found == kMessage ? open_message(self, message) : wait_and_open(self, timeout_ns);
    waited_ns = prim::monotonic_ns() - began;
    end_unlock(&self->end);
  }
  if (opened != nullptr || PyErr_Occurred()) return opened;
  return Py_NewRef(self->nothing);
}

// waited() -> seconds that this thread's last get() has waited.
PyObject* waited(PyObject*, PyObject*) {
  return PyFloat_FromDouble(static_cast<double>(waited_ns) * 1e-9);
}

// Waits for a message; what look() said. -1 with an exception set.
int wait(ReaderEnd* self, PyObject* arguments, Message& message) {
  long long timeout_ns;
  int again;
  if (!PyArg_ParseTuple(arguments, "Lp", &timeout_ns, &again)) return -1;
  while (self->ring != nullptr) {
    const Look found = look(self, false, message);
    if (found != kEmpty) return found;
    shm::RingReader* ring = self->ring;
    shm::WaitResult result;
    Py_BEGIN_ALLOW_THREADS;
    result = ring->wait(timeout_ns, again != 0, self->writer);
    Py_END_ALLOW_THREADS;
    if (result != shm::WaitResult::kReady) return static_cast<int>(result);
  }
  return static_cast<int>(shm::WaitResult::kCancelled);  // detach() came in between
}

// look(timeout_ns, again) -> int, with the lock held: MESSAGE or IN_PLACE (the next message
// stays where it is), or why it did not come, as a WaitResult. Arguments as for RingReader::wait.
PyObject* look_locked(PyObject* self, PyObject* arguments) {
  Message message;
  const int found = wait(of(self), arguments, message);
  return found < 0 ? nullptr : PyLong_FromLong(found);
}

// receive(timeout_ns, again) -> (object,), or what look() returns; with the lock held. Raises as
// open_message().
PyObject* receive(PyObject* object, PyObject* arguments) {
  ReaderEnd* self = of(object);
  Message message;
  const int found = wait(self, arguments, message);
  if (found < 0) return nullptr;
  if (found != kMessage) return PyLong_FromLong(found);
  PyObject* opened = open_message(self, message);
  if (opened == nullptr) return nullptr;
  PyObject* wrapped = PyTuple_Pack(1, opened);
  Py_DECREF(opened);
  return wrapped;
}

// detach(): the ring is not to be touched any more.
PyObject* detach(PyObject* self, PyObject*) {
  of(self)->ring = nullptr;
  return Py_NewRef(Py_None);
}

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) {
  PyObject *loads, *wrap_error, *nothing;
  unsigned long long handle;
  int writer;
  double timeout_s;
  if (!PyArg_ParseTuple(arguments, "KOOOid", &handle, &loads, &wrap_error, &nothing, &writer,
                        &timeout_s)) {
    return nullptr;
  }
  PyObject* made = PyType_GenericAlloc(type, 0);
  if (made == nullptr) return nullptr;
  of(made)->ring = reinterpret_cast<shm::RingReader*>(handle);
  of(made)->writer = writer;
  of(made)->timeout_s = timeout_s;
  of(made)->loads = Py_NewRef(loads);
  of(made)->wrap_error = Py_NewRef(wrap_error);
  of(made)->nothing = Py_NewRef(nothing);
  try {
    of(made)->decoder = new PlainDecoder();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  if (of(made)->decoder == nullptr) {
    Py_DECREF(made);
    return nullptr;
  }
  return made;
}

void dealloc(PyObject* self) {
  delete of(self)->decoder;
  Py_XDECREF(of(self)->loads);
  Py_XDECREF(of(self)->wrap_error);
  Py_XDECREF(of(self)->nothing);
  end_dealloc(self);
}

PyMethodDef methods[] = {
    {"get", get, METH_O, nullptr},
    {"waited", waited, METH_NOARGS, nullptr},
    {"look", look_locked, METH_VARARGS, nullptr},
    {"receive", receive, METH_VARARGS, nullptr},
    {"detach", detach, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"_native_queue.ReaderEnd", sizeof(ReaderEnd), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

bool add_reader_end(PyObject* module, PyObject* end) {
  return add_type(module, end, &spec, "ReaderEnd");
}

}  // namespace python
