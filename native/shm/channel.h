// Messages from one rank to another, of any size, through a ring in the sender's memory.
#pragma once

#include <cstddef>

#include "shm/signature.h"
#include "shm/team.h"

namespace shm {

// Sends `bytes` bytes to rank `to`. Returns when the last of them is in the ring: large messages
// wait for the receiver, small ones do not.
void send(Team& team, DType dtype, const void* data, size_t bytes, int to);

// The size of the next message from rank `from`, which stays there.
size_t next_message_bytes(Team& team, int from);

// Receives a message of exactly `bytes` bytes of `dtype`; anything else is a CommMismatchError.
void recv(Team& team, DType dtype, void* data, size_t bytes, int from);

}  // namespace shm
