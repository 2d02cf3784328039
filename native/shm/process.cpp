#include "shm/process.h"

#include <dlfcn.h>
#include <unistd.h>

namespace shm {

prim::AtomicU32 process_life{0};

namespace {

pthread_t exiting_thread;
prim::AtomicU32 told{0}, returned{0};
thread_local bool was_told = false;

// Runs in the child of fork(), where one thread is left; vfork() and posix_spawn() do not call it.
void in_child() {
  process_life.store(((prim::load_relaxed(process_life) >> 1) + 1) << 1);
  prim::store_relaxed(told, 0u);
  prim::store_relaxed(returned, 0u);
  was_told = false;
}

[[maybe_unused]] const int registered = ::pthread_atfork(nullptr, nullptr, in_child);

bool python_is_finalizing() {
  using Function = int (*)();
  static const auto ask = [] {
    void* found = ::dlsym(RTLD_DEFAULT, "Py_IsFinalizing");  // from 3.13 on
    if (found == nullptr) found = ::dlsym(RTLD_DEFAULT, "_Py_IsFinalizing");
    return reinterpret_cast<Function>(found);
  }();
  return ask != nullptr && ask() != 0;
}

}  // namespace

void begin_exit() {
  exiting_thread = ::pthread_self();
  process_life.fetch_or(1, std::memory_order_seq_cst);
}

bool exit_ends_this_call() {
  return (current_life() & 1) != 0 && ::pthread_equal(::pthread_self(), exiting_thread) == 0;
}

void stop_unless_new() {
  while (was_told || python_is_finalizing()) ::pause();
  was_told = true;
  told.fetch_add(1, std::memory_order_seq_cst);
}

uint32_t threads_on_their_way() {
  return told.load(std::memory_order_seq_cst) - returned.load(std::memory_order_seq_cst);
}

}  // namespace shm

// native.py calls it when it has the error of a thread that was told: the thread holds the
// interpreter's lock by then.
extern "C" __attribute__((visibility("default"))) void communicators_exit_heard() {
  shm::returned.fetch_add(1, std::memory_order_seq_cst);
}
