// A stream of bytes that lies in rows some distance apart: one rank's part of a tensor that is
// split or joined along any dimension.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

namespace shm {

template <typename Byte>
struct Rows {
  Byte* base;
  size_t row;     // bytes in a row
  size_t stride;  // bytes from one row to the next

  // Calls visit(pointer, position - offset, bytes) for each contiguous run in [offset, offset + n).
  template <typename Visit>
  void runs(size_t offset, size_t n, Visit visit) const {
    if (row == stride) return visit(base + offset, size_t{0}, n);
    for (size_t done = 0; done < n;) {
      const size_t in_row = (offset + done) % row;
      const size_t run = std::min(row - in_row, n - done);
      visit(base + (offset + done) / row * stride + in_row, done, run);
      done += run;
    }
  }
};

inline void copy_from(const Rows<const std::byte>& rows, size_t offset, size_t n, std::byte* to) {
  rows.runs(offset, n, [&](const std::byte* at, size_t position, size_t bytes) {
    std::memcpy(to + position, at, bytes);
  });
}

inline void copy_to(const Rows<std::byte>& rows, size_t offset, size_t n, const std::byte* from) {
  rows.runs(offset, n, [&](std::byte* at, size_t position, size_t bytes) {
    std::memcpy(at, from + position, bytes);
  });
}

}  // namespace shm
