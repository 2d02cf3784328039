#include <cstring>

#include "python/plain_codec.h"
#include "python/plain_tags.h"

namespace python {
namespace {

template <typename T>
T load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Of the first and the last eight bytes, which may overlap.
uint64_t key_hash(const char* text, uint32_t bytes) {
  uint64_t first = 0, last = 0;
  if (bytes >= 8) {
    first = load<uint64_t>(text);
    last = load<uint64_t>(text + bytes - 8);
  } else if (bytes >= 4) {
    first = load<uint32_t>(text);
    last = load<uint32_t>(text + bytes - 4);
  } else if (bytes > 0) {
    first = static_cast<unsigned char>(text[0]);
    last = static_cast<unsigned char>(text[bytes / 2]) |
           uint64_t{static_cast<unsigned char>(text[bytes - 1])} << 8;
  }
  return (first ^ (last << 29 | last >> 35) ^ bytes) * 0x9e3779b97f4a7c15u;
}

}  // namespace

PlainDecoder::PlainDecoder() : keys_(new Key[kKeys]()) {}

PlainDecoder::~PlainDecoder() {
  for (uint32_t i = 0; i < kKeys; ++i) Py_XDECREF(keys_[i].object);
}

PyObject* PlainDecoder::decode(const std::byte* from, size_t bytes) {
  at_ = from;
  end_ = from + bytes;
  depth_ = 0;
  // A collection would run finalizers, which may do anything; that of the program's next object
  // comes soon enough.
  const int collects = PyGC_Disable();
  PyObject* object = value();
  if (collects) PyGC_Enable();
  if (object != nullptr && at_ != end_) {
    Py_DECREF(object);
    return malformed();
  }
  return object;
}

PyObject* PlainDecoder::malformed() {
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "not a message of plain data");
  return nullptr;
}

template <typename T>
bool PlainDecoder::read(T& number) {
  if (!left(sizeof number)) return false;
  std::memcpy(&number, at_, sizeof number);
  at_ += sizeof number;
  return true;
}

PyObject* PlainDecoder::value() {
  unsigned char tag;
  if (!read(tag)) return malformed();
  int8_t i8;
  int32_t i32;
  int64_t i64;
  double f64;
  uint32_t size = 0;
  switch (tag) {
    case kNone:
      return Py_NewRef(Py_None);
    case kFalse:
      return Py_NewRef(Py_False);
    case kTrue:
      return Py_NewRef(Py_True);
    case kInt8:
      return read(i8) ? PyLong_FromLong(i8) : malformed();
    case kInt32:
      return read(i32) ? PyLong_FromLong(i32) : malformed();
    case kInt64:
      return read(i64) ? PyLong_FromLongLong(i64) : malformed();
    case kFloat:
      return read(f64) ? PyFloat_FromDouble(f64) : malformed();
    default:
      break;
  }
  if (tag >= kNotPlain) return malformed();
  const bool is_long = (tag - kStr) % 2 != 0;
  unsigned char u8 = 0;
  if (is_long ? !read(size) : !read(u8)) return malformed();
  if (!is_long) size = u8;
  switch (is_long ? tag - 1 : tag) {
    case kStr:
      return text(size);
    case kBytes: {
      if (!left(size)) return malformed();
      const char* from = reinterpret_cast<const char*>(at_);
      at_ += size;
      return PyBytes_FromStringAndSize(from, size);
    }
    case kList:
      return list(size);
    case kTuple:
      return tuple(size);
    default:
      return dict(size);
  }
}

PyObject* PlainDecoder::text(size_t bytes) {
  if (!left(bytes)) return malformed();
  const char* from = reinterpret_cast<const char*>(at_);
  at_ += bytes;
  return PyUnicode_DecodeUTF8(from, static_cast<Py_ssize_t>(bytes), nullptr);
}

// value(), of which short strings are taken from the table.
PyObject* PlainDecoder::key() {
  if (!left(2) || at_[0] != std::byte{kStr}) return value();
  const auto bytes = static_cast<uint32_t>(at_[1]);
  if (bytes > kKeyBytes || !left(2 + size_t{bytes})) return value();
  const char* from = reinterpret_cast<const char*>(at_ + 2);
  Key& known = keys_[(key_hash(from, bytes) >> 32) % kKeys];
  if (known.object != nullptr && known.bytes == bytes &&
      std::memcmp(known.text, from, bytes) == 0) {
    at_ += 2 + bytes;
    return Py_NewRef(known.object);
  }
  PyObject* object = value();
  if (object == nullptr) return nullptr;
  Py_XDECREF(known.object);
  known.bytes = bytes;
  std::memcpy(known.text, from, bytes);
  known.object = Py_NewRef(object);
  return object;
}

template <auto kNew, auto kSetItem>
PyObject* PlainDecoder::sequence(size_t count) {
  // Each value takes a byte at least: no size that is wrong asks for much memory.
  if (!left(count) || depth_ == kMaxDepth) return malformed();
  PyObject* made = kNew(static_cast<Py_ssize_t>(count));
  if (made == nullptr) return nullptr;
  ++depth_;
  for (size_t i = 0; i < count; ++i) {
    PyObject* item = value();
    if (item == nullptr) {
      Py_DECREF(made);
      return nullptr;
    }
    kSetItem(made, static_cast<Py_ssize_t>(i), item);
  }
  --depth_;
  return made;
}

PyObject* PlainDecoder::list(size_t count) { return sequence<PyList_New, PyList_SetItem>(count); }

PyObject* PlainDecoder::tuple(size_t count) {
  return sequence<PyTuple_New, PyTuple_SetItem>(count);
}

PyObject* PlainDecoder::dict(size_t count) {
  if (!left(2 * count) || depth_ == kMaxDepth) return malformed();
  PyObject* made = PyDict_New();
  if (made == nullptr) return nullptr;
  ++depth_;
  for (size_t i = 0; i < count; ++i) {
    PyObject* name = key();
    PyObject* item = name != nullptr ? value() : nullptr;
    const bool stored = item != nullptr && PyDict_SetItem(made, name, item) == 0;
    Py_XDECREF(name);
    Py_XDECREF(item);
    if (!stored) {
      Py_DECREF(made);
      return nullptr;
    }
  }
  --depth_;
  return made;
}

}  // namespace python
