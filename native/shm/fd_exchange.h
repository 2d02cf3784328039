// Every rank of a group gets the descriptor of every other rank's shared memory.
//
// They travel over connected sockets of abstract names, to whom the kernel says is of this user
// (SO_PEERCRED), which is asked before a descriptor is sent. Anybody on the machine may connect, or
// take a name before its rank does: strangers are dropped, and a name that the kernel picked
// (Meeting) cannot be taken.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "prim/deadline.h"
#include "shm/fd.h"

namespace shm {

struct PeerFd {
  Fd fd;          // empty for this rank itself
  pid_t pid = 0;  // as seen from this process; 0: in a pid namespace that it cannot see
};

// Where the peers find this rank.
struct Meeting {
  Fd socket;
  std::string address;

  // At an address of the kernel's, for peers that are told it.
  static Meeting anywhere();
};

// Sends `fd`, of a region (region.h), to all other ranks and returns theirs, in rank order.
// Collective over the ranks, which all live in one network namespace of one host, as one user.
//
// Args:
//   name: the same on all ranks, used by no other exchange of this user at the same time.
//   meeting, addresses: this rank's, and those of all, where they were told; else empty, and the
//     addresses follow from the name. Then others may know them, and who takes one keeps the group
//     from opening: an error says so.
//   deadline: an error naming the ranks that have not answered by then.
// std::runtime_error, of a text that starts with the name of the Python exception. A signal handler
// of Python that raises ends it (shm/interrupt.h), as does the exit of the process.
std::vector<PeerFd> exchange_fds(const std::string& name, Meeting meeting,
                                 std::vector<std::string> addresses, int rank, int world_size,
                                 int fd, const prim::Deadline& deadline);

}  // namespace shm
