// Every rank of a group gets a file descriptor of every other rank (shared memory, GPU memory).
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

// Sends `fd` to all other ranks and returns theirs, in rank order. Collective over the ranks, which
// all live in one network namespace of one host and run as one user.
//
// Args:
//   name: the same on all ranks, used by no other exchange of this user at the same time.
//   deadline: std::runtime_error naming the ranks that have not answered by then; its text starts
//     with "CommTimeoutError: ".
// A signal handler of Python that raises ends it (shm/interrupt.h).
std::vector<PeerFd> exchange_fds(const std::string& name, int rank, int world_size, int fd,
                                 const prim::Deadline& deadline);

}  // namespace shm
