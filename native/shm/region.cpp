#include "shm/region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace shm {
namespace {

std::string text_of(int error) { return std::strerror(error); }

// A file without a name in `dir`; a memfd where the file system has no such files.
Fd open_unnamed(const std::string& dir) {
  Fd fd(::open(dir.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (fd) return fd;
  // EISDIR is what kernels and file systems without O_TMPFILE answer.
  if (errno == EOPNOTSUPP || errno == EISDIR) {
    struct stat info;
    if (::stat(dir.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) {
      fd = Fd(static_cast<int>(::syscall(SYS_memfd_create, "communicators", 1u /* CLOEXEC */)));
      if (fd) return fd;
    }
  }
  throw std::runtime_error("CommunicatorError: shared memory: no file can be made in " + dir +
                           ": " + text_of(errno) +
                           "; COMMUNICATORS_SHM_DIR names the directory, one on a tmpfs that this "
                           "user may write to is expected");
}

[[noreturn]] void throw_too_small(const std::string& dir, const Fd& fd, size_t bytes) {
  struct statvfs fs{};
  ::fstatvfs(fd.get(), &fs);
  const auto unit = static_cast<unsigned long long>(fs.f_frsize);
  throw std::runtime_error(
      "CommunicatorError: shared memory: " + std::to_string(bytes) + " bytes are needed in " + dir +
      ", which has " + std::to_string(fs.f_bavail * unit) + " bytes free of " +
      std::to_string(fs.f_blocks * unit) +
      "; make it larger (containers: --shm-size; else mount -o remount,size=...), or set "
      "COMMUNICATORS_SHM_BYTES lower or COMMUNICATORS_SHM_DIR to a larger tmpfs");
}

std::byte* map_shared(const Fd& fd, size_t bytes) {
  void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (data == MAP_FAILED) {
    throw std::runtime_error("CommunicatorError: shared memory: " + std::to_string(bytes) +
                             " bytes cannot be mapped: " + text_of(errno));
  }
  return static_cast<std::byte*>(data);
}

// All of the file, for writing.
struct flock whole_file() {
  struct flock lock{};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  return lock;
}

void lock(const Fd& fd, const std::string& dir) {
  struct flock mine = whole_file();
  if (::fcntl(fd.get(), F_SETLK, &mine) == 0) return;
  throw std::runtime_error("CommunicatorError: shared memory: a file in " + dir +
                           " cannot be locked: " + text_of(errno) +
                           "; COMMUNICATORS_SHM_DIR names the directory, one on a tmpfs is "
                           "expected");
}

}  // namespace

bool owner_is_gone(const Fd& region) {
  struct flock theirs = whole_file();
  return ::fcntl(region.get(), F_GETLK, &theirs) == 0 && theirs.l_type == F_UNLCK;
}

bool Region::owner_is_gone() const { return shm::owner_is_gone(fd_); }

Region Region::create(const std::string& dir, size_t bytes) {
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  bytes = (bytes + page - 1) / page * page;
  Fd fd = open_unnamed(dir);
  lock(fd, dir);
  int error;
  do {
    error = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  if (error == ENOSPC || error == EFBIG || error == EDQUOT) throw_too_small(dir, fd, bytes);
  if (error != 0) {
    throw std::runtime_error("CommunicatorError: shared memory: " + std::to_string(bytes) +
                             " bytes cannot be reserved in " + dir + ": " + text_of(error));
  }
  std::byte* data = map_shared(fd, bytes);
  return Region(std::move(fd), data, bytes);
}

Region Region::map(Fd fd, size_t bytes) {
  struct stat info;
  if (::fstat(fd.get(), &info) != 0) {
    throw std::runtime_error(
        "CommunicatorError: shared memory: a peer's descriptor is not usable: " + text_of(errno));
  }
  const auto size = static_cast<size_t>(info.st_size);
  if (size == 0 || size < bytes) {
    throw std::runtime_error("CommunicatorError: shared memory: a peer's region has " +
                             std::to_string(size) + " bytes, " + std::to_string(bytes) +
                             " are expected");
  }
  std::byte* data = map_shared(fd, size);
  return Region(std::move(fd), data, size);
}

Region::Region(Region&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

Region& Region::operator=(Region&& other) noexcept {
  if (this != &other) {
    unmap();
    fd_ = std::move(other.fd_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

Region::~Region() { unmap(); }

void Region::unmap() {
  if (data_ != nullptr) ::munmap(data_, size_);
  data_ = nullptr;
  size_ = 0;
}

}  // namespace shm
