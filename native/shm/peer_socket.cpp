#include "shm/peer_socket.h"

#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>

namespace shm {
namespace {

constexpr int kBacklog = 4096;  // the kernel's own limit (net.core.somaxconn) is less or the same

struct Address {
  sockaddr_un socket{};
  socklen_t length;

  // Abstract names begin with a zero byte; the kernel frees them with the socket.
  explicit Address(const std::string& name) {
    const size_t bytes = std::min(name.size(), sizeof socket.sun_path - 1);
    socket.sun_family = AF_UNIX;
    std::memcpy(socket.sun_path + 1, name.data(), bytes);
    length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + bytes);
    if (name.empty())
      length = sizeof socket.sun_family;  // the kernel picks one (unix(7), autobind)
  }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&socket); }
};

// Takes the first descriptor of a control message, and closes all others.
void take_rights(const cmsghdr* control, Fd& fd) {
  const size_t count = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
  for (size_t i = 0; i < count; ++i) {
    int one;
    std::memcpy(&one, CMSG_DATA(control) + i * sizeof(int), sizeof one);
    Fd owned(one);
    if (!fd) fd = std::move(owned);
  }
}

}  // namespace

uint64_t hash_of(const std::string& text) {
  uint64_t hash = 14695981039346656037ull;
  for (unsigned char c : text) hash = (hash ^ c) * 1099511628211ull;
  return hash;
}

// "device-communicators/<uid>/<name>/<rank>". Long names are cut and told apart by their hash.
std::string address_of(const std::string& name, int rank) {
  std::string short_name = name;
  if (name.size() > 48) {
    char digits[17];
    std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(hash_of(name)));
    short_name = name.substr(0, 30) + "~" + digits;
  }
  return "device-communicators/" + std::to_string(::geteuid()) + "/" + short_name + "/" +
         std::to_string(rank);
}

Fd make_socket() { return Fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

bool listen_at(const Fd& socket, const std::string& address) {
  const Address mine(address);
  return ::bind(socket.get(), mine.get(), mine.length) == 0 &&
         ::listen(socket.get(), kBacklog) == 0;
}

std::string address_of(const Fd& socket) {
  sockaddr_un found{};
  socklen_t length = sizeof found;
  ::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&found), &length);
  const size_t begin = offsetof(sockaddr_un, sun_path) + 1;
  return length > begin ? std::string(found.sun_path + 1, length - begin) : std::string();
}

bool connect_to(const Fd& socket, const std::string& address) {
  const Address theirs(address);
  return ::connect(socket.get(), theirs.get(), theirs.length) == 0;
}

Fd accept_from(const Fd& socket) {
  return Fd(::accept4(socket.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

ucred peer_of(const Fd& socket) {
  ucred peer{0, static_cast<uid_t>(-1), static_cast<gid_t>(-1)};
  socklen_t length = sizeof peer;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) {
    peer.uid = static_cast<uid_t>(-1);
  }
  return peer;
}

Transfer send_hello(const Fd& socket, const Hello& hello, int fd) {
  iovec payload{const_cast<Hello*>(&hello), sizeof hello};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  cmsghdr* rights = CMSG_FIRSTHDR(&message);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
  if (::sendmsg(socket.get(), &message, MSG_NOSIGNAL) >= 0) return Transfer::kDone;
  switch (errno) {
    case EAGAIN:
    case EINTR:
    case ENOBUFS:
    case ETOOMANYREFS:  // too many descriptors of this user are under way
      return Transfer::kNotYet;
    default:
      return Transfer::kFailed;
  }
}

Transfer receive_hello(const Fd& socket, Hello& hello, Fd& fd) {
  iovec payload{&hello, sizeof hello};
  alignas(cmsghdr) char control[CMSG_SPACE(4 * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &payload;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = ::recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC);
  if (got < 0) return errno == EAGAIN || errno == EINTR ? Transfer::kNotYet : Transfer::kFailed;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) take_rights(c, fd);
  }
  const bool ours = got == static_cast<ssize_t>(sizeof hello) &&
                    std::memcmp(hello.magic, Hello::kMagic, sizeof hello.magic) == 0;
  return ours ? Transfer::kDone : Transfer::kFailed;
}

}  // namespace shm
