#include "shm/fd_exchange.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "shm/interrupt.h"

namespace shm {
namespace {

// What travels beside the descriptor.
struct Hello {
  char magic[8];
  uint32_t version;
  int32_t rank;
  int32_t world_size;
};
constexpr char kMagic[8] = {'d', 'e', 'v', 'c', 'o', 'm', 'm', '\0'};
constexpr uint32_t kVersion = 1;

struct Address {
  sockaddr_un socket{};
  socklen_t length;

  // "\0device-communicators/<uid>/<name>/<rank>": an abstract name, which the kernel frees with the
  // socket. Long names are cut and told apart by their FNV-1a hash.
  Address(const std::string& name, int rank) {
    std::string short_name = name;
    if (name.size() > 48) {
      uint64_t hash = 14695981039346656037ull;
      for (unsigned char c : name) hash = (hash ^ c) * 1099511628211ull;
      char digits[17];
      std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash));
      short_name = name.substr(0, 30) + "~" + digits;
    }
    const std::string path = "device-communicators/" + std::to_string(::getuid()) + "/" +
                             short_name + "/" + std::to_string(rank);
    socket.sun_family = AF_UNIX;
    std::memcpy(socket.sun_path + 1, path.data(), path.size());
    length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + path.size());
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&socket); }
};

[[noreturn]] void fail(const std::string& name, const std::string& what) {
  throw std::runtime_error("exchange of descriptors '" + name + "': " + what);
}

class Exchange {
 public:
  Exchange(const std::string& name, int rank, int world_size, int fd)
      : name_(name),
        rank_(rank),
        world_size_(world_size),
        fd_(fd),
        sent_(world_size, false),
        received_(world_size) {
    if (world_size < 1 || rank < 0 || rank >= world_size) {
      fail(name,
           "rank " + std::to_string(rank) + " is not in 0.." + std::to_string(world_size - 1));
    }
  }

  std::vector<PeerFd> run(const prim::Deadline& deadline) {
    sent_[rank_] = true;
    received_[rank_].pid = ::getpid();
    bind(deadline);
    int pause_ms = 1;
    for (;;) {
      for (int peer = 0; peer < world_size_; ++peer) {
        if (!sent_[peer]) sent_[peer] = send_to(peer);
      }
      while (receive()) {
      }
      if (complete()) break;
      // While a peer has no socket yet there is nothing to be woken by: look again soon.
      wait(all_sent() ? 100 : pause_ms);
      pause_ms = std::min(pause_ms * 2, 16);
      throw_if_interrupted();
      if (deadline.passed()) throw_late();
    }
    return std::move(received_);
  }

 private:
  bool all_sent() const {
    return std::all_of(sent_.begin(), sent_.end(), [](bool s) { return s; });
  }
  bool have(int peer) const { return peer == rank_ || received_[peer].fd; }
  bool complete() const {
    for (int peer = 0; peer < world_size_; ++peer) {
      if (!have(peer)) return false;
    }
    return all_sent();
  }

  void bind(const prim::Deadline& deadline) {
    socket_ = Fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket_) fail(name_, std::string("no socket: ") + std::strerror(errno));
    const int on = 1;
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_PASSCRED, &on, sizeof on);
    const Address mine(name_, rank_);
    // The name may still be taken by a process that is being killed.
    while (::bind(socket_.get(), mine.get(), mine.length) != 0) {
      if (errno != EADDRINUSE || deadline.passed()) {
        fail(name_, "rank " + std::to_string(rank_) +
                        " cannot bind its socket: " + std::strerror(errno) +
                        "; every exchange of one user needs a name of its own");
      }
      ::usleep(1000);
      throw_if_interrupted();
    }
  }

  void wait(int ms) {
    pollfd ready{socket_.get(), POLLIN, 0};
    ::poll(&ready, 1, ms);
  }

  // False if the peer is not there yet or its queue is full.
  bool send_to(int peer) {
    const Address to(name_, peer);
    Hello hello{{}, kVersion, rank_, world_size_};
    std::memcpy(hello.magic, kMagic, sizeof kMagic);
    iovec payload{&hello, sizeof hello};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_name = const_cast<sockaddr*>(to.get());
    message.msg_namelen = to.length;
    message.msg_iov = &payload;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(rights), &fd_, sizeof fd_);
    if (::sendmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return true;
    switch (errno) {
      case ECONNREFUSED:
      case ENOENT:
      case EAGAIN:
      case EINTR:
      case ENOBUFS:
      case ETOOMANYREFS:
        return false;
      default:
        fail(name_, "rank " + std::to_string(rank_) + " cannot send to rank " +
                        std::to_string(peer) + ": " + std::strerror(errno));
    }
  }

  // Takes one message; false if there is none.
  bool receive() {
    Hello hello{};
    iovec payload{&hello, sizeof hello};
    alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int)) + CMSG_SPACE(sizeof(ucred))] = {};
    msghdr message{};
    message.msg_iov = &payload;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t got = ::recvmsg(socket_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0) {
      if (errno == EAGAIN || errno == EINTR) return false;
      fail(name_, std::string("recvmsg: ") + std::strerror(errno));
    }
    Fd fd;
    ucred sender{0, static_cast<uid_t>(-1), static_cast<gid_t>(-1)};
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
      if (c->cmsg_level != SOL_SOCKET) continue;
      if (c->cmsg_type == SCM_CREDENTIALS) std::memcpy(&sender, CMSG_DATA(c), sizeof sender);
      if (c->cmsg_type == SCM_RIGHTS) {
        const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; ++i) {  // all but the first are closed again
          int one;
          std::memcpy(&one, CMSG_DATA(c) + i * sizeof(int), sizeof one);
          Fd owned(one);
          if (!fd) fd = std::move(owned);
        }
      }
    }
    // An abstract name is open to every user of the machine: what is not from this user or not of
    // this protocol is dropped.
    if (sender.uid != ::getuid() || got != static_cast<ssize_t>(sizeof hello) ||
        std::memcmp(hello.magic, kMagic, sizeof kMagic) != 0) {
      return true;
    }
    accept(hello, sender, std::move(fd));
    return true;
  }

  void accept(const Hello& hello, const ucred& sender, Fd fd) {
    const std::string who = "rank " + std::to_string(hello.rank);
    if (hello.version != kVersion) {
      fail(name_, who + " speaks version " + std::to_string(hello.version) +
                      ", this rank version " + std::to_string(kVersion));
    }
    if (hello.world_size != world_size_ || hello.rank < 0 || hello.rank >= world_size_ ||
        hello.rank == rank_) {
      fail(name_, who + " of " + std::to_string(hello.world_size) + " (pid " +
                      std::to_string(sender.pid) + ") called this rank, " + std::to_string(rank_) +
                      " of " + std::to_string(world_size_));
    }
    if (!fd) {
      fail(name_,
           "the descriptor of " + who +
               " did not arrive; this process may be at its limit of open files (ulimit -n)");
    }
    if (have(hello.rank)) {
      fail(name_, who + " answered twice (pids " + std::to_string(received_[hello.rank].pid) +
                      " and " + std::to_string(sender.pid) +
                      "); every exchange needs a name of its own");
    }
    received_[hello.rank] = PeerFd{std::move(fd), sender.pid};
  }

  [[noreturn]] void throw_late() const {
    std::string late;
    for (int peer = 0; peer < world_size_; ++peer) {
      if (have(peer) && sent_[peer]) continue;
      late += (late.empty() ? "" : ", ") + std::to_string(peer);
    }
    throw std::runtime_error("CommTimeoutError: exchange of descriptors '" + name_ + "': rank " +
                             std::to_string(rank_) + " of " + std::to_string(world_size_) +
                             " has no answer from rank " + late +
                             "; all ranks must call with this name, on one host, in one network "
                             "namespace and as one user");
  }

  std::string name_;
  int rank_;
  int world_size_;
  int fd_;
  Fd socket_;
  std::vector<bool> sent_;
  std::vector<PeerFd> received_;
};

}  // namespace

std::vector<PeerFd> exchange_fds(const std::string& name, int rank, int world_size, int fd,
                                 const prim::Deadline& deadline) {
  return Exchange(name, rank, world_size, fd).run(deadline);
}

}  // namespace shm
