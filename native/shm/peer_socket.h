// The sockets that an exchange of descriptors (fd_exchange.h) is made of: none of them blocks.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <string>

#include "shm/fd.h"

namespace shm {

// What travels beside the descriptor.
struct Hello {
  static constexpr char kMagic[8] = {'d', 'e', 'v', 'c', 'o', 'm', 'm', '\0'};
  static constexpr uint32_t kVersion = 2;

  char magic[8];
  uint32_t version;
  int32_t rank;
  int32_t world_size;
  uint32_t reserved;
  uint64_t exchange;  // hash of its name: a connection may be meant for another one
};

// FNV-1a.
uint64_t hash_of(const std::string& text);

// The address of a rank, where it follows from the name of the exchange.
std::string address_of(const std::string& name, int rank);

Fd make_socket();
// Binds to `address`, or to one that the kernel picks, and listens. False with errno.
bool listen_at(const Fd& socket, const std::string& address);
std::string address_of(const Fd& socket);
// False with errno, ECONNREFUSED if nobody listens there.
bool connect_to(const Fd& socket, const std::string& address);
// One of those who have connected; empty if there is none, with errno.
Fd accept_from(const Fd& socket);
// Whom the kernel knows to be at the other end: who listened, or who connected.
ucred peer_of(const Fd& socket);

enum class Transfer { kDone, kNotYet, kFailed };
// Sends hello with the descriptor. kFailed with errno.
Transfer send_hello(const Fd& socket, const Hello& hello, int fd);
// kFailed: the other end was closed, or what came is not of this protocol. `fd` stays empty if the
// descriptor found no room in this process.
Transfer receive_hello(const Fd& socket, Hello& hello, Fd& fd);

}  // namespace shm
