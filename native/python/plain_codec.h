// Plain data to bytes and back: None, bool, int, float, str, bytes, list, tuple and dict, of
// exactly these types, without any other object inside. What a scheduler sends in every step is
// that, and takes half the time that pickle takes. Everything else is left to pickle.
//
// A message is one value; sizes and numbers are those of this machine (little-endian ones here):
//
//   tag  value                        tag  value
//   00   None                         07   str, u8 bytes of UTF-8      08   u32
//   01   False                        09   bytes, u8 bytes             0a   u32
//   02   True                         0b   list, u8 values             0c   u32
//   03   int, i8                      0d   tuple, u8 values            0e   u32
//   04   int, i32                     0f   dict, u8 pairs of values    10   u32
//   05   int, i64
//   06   float, f64
//
// A pickle of protocol 2 or later begins with 80, so that the two can be told apart.
//
// Python functions of the limited API alone are called, and none that runs code of the program, so
// that a call is one step to every other thread (with the interpreter's lock held throughout).
// communicators/message_queue/plain.py reads the same bytes without this library.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace python {

inline constexpr unsigned char kPickleBegin = 0x80;

class PlainEncoder {
 public:
  PlainEncoder();

  // The bytes written to `to`; 0 if `object` is not plain, is more than `room` bytes, is nested too
  // deeply, or holds a list, dict or tuple of them twice: pickle keeps them one object.
  // Leaves no Python exception set.
  size_t encode(PyObject* object, std::byte* to, size_t room);

 private:
  static constexpr int kMaxDepth = 32;
  static constexpr uint32_t kSeen = 1024, kMaxSeen = kSeen / 2;
  struct Seen {
    PyObject* object;
    uint64_t message;
  };

  bool value(PyObject* object);
  bool integer(PyObject* object);
  bool text(PyObject* object);
  bool octets(PyObject* object);
  bool list(PyObject* object);
  bool tuple(PyObject* object);
  bool dict(PyObject* object);
  bool first_time(PyObject* object);
  bool sized(unsigned char short_tag, Py_ssize_t size);
  bool copied(unsigned char short_tag, const char* from, Py_ssize_t size);
  template <typename T>
  bool tagged(unsigned char tag, T number);
  bool room_for(size_t bytes) const { return static_cast<size_t>(end_ - at_) >= bytes; }

  std::byte* at_ = nullptr;
  std::byte* end_ = nullptr;
  int depth_ = 0;
  // Containers of this message that something else refers to as well: an open hash table, whose
  // entries of earlier messages count as empty.
  uint64_t message_ = 0;
  uint32_t seen_count_ = 0;
  std::unique_ptr<Seen[]> seen_;
};

class PlainDecoder {
 public:
  PlainDecoder();
  ~PlainDecoder();
  PlainDecoder(const PlainDecoder&) = delete;
  PlainDecoder& operator=(const PlainDecoder&) = delete;

  // A new reference; null with ValueError (not such a message) or MemoryError set.
  PyObject* decode(const std::byte* from, size_t bytes);

 private:
  static constexpr int kMaxDepth = 64;
  static constexpr uint32_t kKeys = 256, kKeyBytes = 28;
  // Keys come again and again: the str objects of the last ones are kept, with their hashes.
  struct Key {
    uint32_t bytes;
    char text[kKeyBytes];
    PyObject* object;
  };

  PyObject* value();
  PyObject* key();
  template <auto kNew, auto kSetItem>
  PyObject* sequence(size_t count);
  PyObject* list(size_t count);
  PyObject* tuple(size_t count);
  PyObject* dict(size_t count);
  PyObject* malformed();
  PyObject* text(size_t bytes);
  bool left(size_t bytes) const { return static_cast<size_t>(end_ - at_) >= bytes; }
  template <typename T>
  bool read(T& number);

  const std::byte* at_ = nullptr;
  const std::byte* end_ = nullptr;
  int depth_ = 0;
  std::unique_ptr<Key[]> keys_;
};

}  // namespace python
