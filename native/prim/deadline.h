// A point on the monotonic clock until which something may wait.
#pragma once

#include <time.h>

#include <cstdint>

namespace prim {

inline int64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

class Deadline {
 public:
  static Deadline after_seconds(double seconds) {
    return Deadline(monotonic_ns() + static_cast<int64_t>(seconds * 1e9));
  }
  static Deadline after_ns(int64_t ns) { return Deadline(monotonic_ns() + ns); }

  int64_t left_ns() const { return at_ns_ - monotonic_ns(); }
  bool passed() const { return left_ns() <= 0; }

 private:
  explicit Deadline(int64_t at_ns) : at_ns_(at_ns) {}
  int64_t at_ns_;
};

}  // namespace prim
