// The process that a group was opened in: its forked children, and its exit.
//
// A forked child has a copy of everything and owns none of it: what it calls is refused. When the
// process exits, Python cuts off a thread that asks for the interpreter's lock (pthread_exit, up to
// 3.13), and that unwinds through frames of torch which may not be unwound: SIGABRT in place of the
// program's own exit code. So the calls of other threads end before (native.py has the hook), and a
// thread that comes back all the same is stopped where it does no harm. The thread that exits may
// call as ever: a program may have a last collective in its atexit handlers.
#pragma once

#include <pthread.h>

#include <stdexcept>
#include <string>

#include "prim/atomic.h"

namespace shm {

// Changes where calls are no longer to be made: bit 0 when the process exits, the rest in a forked
// child. What was opened compares it with what it was then, in every call.
extern prim::AtomicU32 process_life;

inline uint32_t current_life() { return process_life.load(std::memory_order_seq_cst); }
// Whether what was opened at `life` is of this process, and not of one that forked it.
inline bool is_of_this_process(uint32_t life) { return (current_life() ^ life) < 2; }

// For the hook: from now on the calls of all threads but this one end.
void begin_exit();
// Whether the process exits, and this is another thread than the one that does it.
bool exit_ends_this_call();
// Does not return if this thread was told before, or Python does not run it any more. Else it is to
// be told now, by an error that starts with "Exiting: ".
void stop_unless_new();
inline void throw_if_exiting(const std::string& where) {
  if (!exit_ends_this_call()) return;
  stop_unless_new();
  throw std::runtime_error("Exiting: " + where + ": this process exits");
}
// Threads that were told and are not back in Python yet.
uint32_t threads_on_their_way();

}  // namespace shm
