#include "shm/interrupt.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace shm {
namespace {

struct Python {
  template <typename Function>
  static void find(const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(::dlsym(RTLD_DEFAULT, name));
  }

  Python() {
    find("Py_IsInitialized", is_initialized);
    find("PyGILState_Ensure", ensure);
    find("PyGILState_Release", release);
    find("PyErr_CheckSignals", check_signals);
    find("PyErr_Fetch", fetch);
    find("PyErr_Restore", restore);
    present = is_initialized && ensure && release && check_signals && fetch && restore;
  }

  // PyGILState_STATE is an enum, passed as an int.
  int (*is_initialized)();
  int (*ensure)();
  void (*release)(int);
  int (*check_signals)();
  void (*fetch)(void**, void**, void**);
  void (*restore)(void*, void*, void*);
  bool present;
};

const Python& python() {
  static const Python found;
  return found;
}

// The exception that a handler raised, of the thread that it raised it in.
thread_local void* pending[3] = {nullptr, nullptr, nullptr};

}  // namespace

bool python_handler_raised() {
  // Handlers run in the main thread alone. No other thread asks for the interpreter's lock here: it
  // may be held for long, and a process that exits gives it to nobody any more.
  if (::syscall(SYS_gettid) != ::getpid()) return false;
  const Python& py = python();
  if (!py.present || !py.is_initialized()) return false;
  const int state = py.ensure();
  const bool raised = py.check_signals() != 0;
  if (raised) py.fetch(&pending[0], &pending[1], &pending[2]);
  py.release(state);
  return raised;
}

}  // namespace shm

// Sets the kept exception again. Called through ctypes.PyDLL, which holds the interpreter's lock
// and raises the exception that is set after a call.
extern "C" __attribute__((visibility("default"))) void communicators_reraise() {
  const shm::Python& py = shm::python();
  if (!py.present || shm::pending[0] == nullptr) return;
  py.restore(shm::pending[0], shm::pending[1], shm::pending[2]);
  for (void*& part : shm::pending) part = nullptr;
}
