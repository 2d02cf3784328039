#include <cstring>

#include "python/plain_codec.h"
#include "python/plain_tags.h"

namespace python {

PlainEncoder::PlainEncoder() : seen_(new Seen[kSeen]()) {}

size_t PlainEncoder::encode(PyObject* object, std::byte* to, size_t room) {
  at_ = to;
  end_ = to + room;
  depth_ = 0;
  ++message_;
  seen_count_ = 0;
  return value(object) ? static_cast<size_t>(at_ - to) : 0;
}

bool PlainEncoder::value(PyObject* object) {
  const PyTypeObject* type = Py_TYPE(object);
  if (type == &PyLong_Type) return integer(object);
  if (type == &PyUnicode_Type) return text(object);
  if (type == &PyList_Type) return list(object);
  if (type == &PyDict_Type) return dict(object);
  if (type == &PyFloat_Type) return tagged(kFloat, PyFloat_AsDouble(object));
  if (type == &PyTuple_Type) return tuple(object);
  if (type == &PyBytes_Type) return octets(object);
  const unsigned char tag = object == Py_None    ? kNone
                            : object == Py_False ? kFalse
                            : object == Py_True  ? kTrue
                                                 : kNotPlain;
  if (tag == kNotPlain || !room_for(1)) return false;
  *at_++ = std::byte{tag};
  return true;
}

template <typename T>
bool PlainEncoder::tagged(unsigned char tag, T number) {
  if (!room_for(1 + sizeof number)) return false;
  *at_++ = std::byte{tag};
  std::memcpy(at_, &number, sizeof number);
  at_ += sizeof number;
  return true;
}

bool PlainEncoder::integer(PyObject* object) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow != 0) return false;
  if (number == static_cast<int8_t>(number)) return tagged(kInt8, static_cast<int8_t>(number));
  if (number == static_cast<int32_t>(number)) return tagged(kInt32, static_cast<int32_t>(number));
  return tagged(kInt64, static_cast<int64_t>(number));
}

// The tag for sizes in 32 bits follows that for sizes in 8.
bool PlainEncoder::sized(unsigned char short_tag, Py_ssize_t size) {
  if (size <= UINT8_MAX) return tagged(short_tag, static_cast<uint8_t>(size));
  if (size > UINT32_MAX) return false;
  return tagged(static_cast<unsigned char>(short_tag + 1), static_cast<uint32_t>(size));
}

bool PlainEncoder::copied(unsigned char short_tag, const char* from, Py_ssize_t size) {
  if (!sized(short_tag, size) || !room_for(static_cast<size_t>(size))) return false;
  std::memcpy(at_, from, static_cast<size_t>(size));
  at_ += size;
  return true;
}

bool PlainEncoder::text(PyObject* object) {
  Py_ssize_t size = 0;
  const char* utf8 = PyUnicode_AsUTF8AndSize(object, &size);
  if (utf8 == nullptr) {  // a lone surrogate
    PyErr_Clear();
    return false;
  }
  return copied(kStr, utf8, size);
}

bool PlainEncoder::octets(PyObject* object) {
  return copied(kBytes, PyBytes_AsString(object), PyBytes_Size(object));
}

// What is met twice in a message, or is inside of something that is, has more than one reference
// itself or inside of something that has. (One that only the program refers to as well is noted for
// nothing.)
bool PlainEncoder::first_time(PyObject* object) {
  if (Py_REFCNT(object) == 1) return true;
  if (++seen_count_ > kMaxSeen) return false;
  auto at = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(object) * 0x9e3779b97f4a7c15u >> 40) %
            kSeen;
  for (; seen_[at].message == message_; at = (at + 1) % kSeen) {
    if (seen_[at].object == object) return false;
  }
  seen_[at] = Seen{object, message_};
  return true;
}

bool PlainEncoder::list(PyObject* object) {
  const Py_ssize_t count = PyList_Size(object);
  if (depth_ == kMaxDepth || !first_time(object) || !sized(kList, count)) return false;
  ++depth_;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!value(PyList_GetItem(object, i))) return false;
  }
  --depth_;
  return true;
}

bool PlainEncoder::tuple(PyObject* object) {
  const Py_ssize_t count = PyTuple_Size(object);
  // There is only one empty tuple.
  if (depth_ == kMaxDepth || (count > 0 && !first_time(object)) || !sized(kTuple, count)) {
    return false;
  }
  ++depth_;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!value(PyTuple_GetItem(object, i))) return false;
  }
  --depth_;
  return true;
}

bool PlainEncoder::dict(PyObject* object) {
  if (depth_ == kMaxDepth || !first_time(object) || !sized(kDict, PyDict_Size(object))) {
    return false;
  }
  ++depth_;
  Py_ssize_t at = 0;
  PyObject *key, *item;
  while (PyDict_Next(object, &at, &key, &item)) {
    // A tuple as key would have to be hashed, by methods of what is inside.
    const PyTypeObject* type = Py_TYPE(key);
    if (type == &PyTuple_Type || !value(key) || !value(item)) return false;
  }
  --depth_;
  return true;
}

}  // namespace python
