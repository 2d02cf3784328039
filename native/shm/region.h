// Shared memory that no name refers to.
//
// The file behind a region is created without a directory entry, and peers get its descriptor over
// a socket (fd_exchange.h). When the last process that maps it is gone, however it went, the kernel
// frees it: nothing can be left in /dev/shm.
//
// The process that created it holds a POSIX lock on the file (fcntl(2), F_SETLK) until it ends.
// Such a lock is the process's own: a forked child does not inherit it, the kernel gives it up
// whichever way the process ends, and others see it from any pid namespace. So it tells the dead
// from the late, and costs no descriptor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "shm/fd.h"

namespace shm {

class Region {
 public:
  Region() = default;
  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;
  ~Region();

  // New memory of `bytes` (rounded up to pages), zeros, taken from the tmpfs mounted at `dir`. All
  // of it is reserved here, so that writing to it later cannot raise SIGBUS; if there is too little
  // the std::runtime_error says what is needed, what is free and what to do.
  static Region create(const std::string& dir, size_t bytes);

  // Maps memory that a peer created. std::runtime_error if it is smaller than `bytes`; 0: whatever
  // size it has.
  static Region map(Fd fd, size_t bytes = 0);

  // Whether the process that created it has ended. Not to be asked by that process itself.
  bool owner_is_gone() const;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  int fd() const { return fd_.get(); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  Region(Fd fd, std::byte* data, size_t size) : fd_(std::move(fd)), data_(data), size_(size) {}
  void unmap();

  Fd fd_;
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// The same by the descriptor alone.
bool owner_is_gone(const Fd& region);

}  // namespace shm
