// What the host sides of the exact and of the quantized collectives have in common: the device they
// launch on, what it reports, the calls that graphs have recorded, and the handles that Python and
// torch's operators hold. Knows nothing of torch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "collectives/captures.h"
#include "collectives/workspace_words.h"
#include "prim/error.h"
#include "prim/gpu_spin.h"

namespace collectives {

// One rank's end of a group's collectives, over memory of all ranks that this process has mapped.
class Communicator {
 public:
  // The caller has seen to it that no kernel of ours is in flight.
  virtual ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // Throws what the device has reported since the communicator was made.
  void check() const {
    if (const_cast<const volatile gpu::SpinReport*>(report_)->code != gpu::kSpinNone) fail();
  }
  // Makes every kernel on this rank's memory from now on end at once. Waits for those in flight.
  void retire();
  void set_timeout_ns(uint64_t timeout_ns) { spin_.timeout_ns = timeout_ns; }
  int device() const { return device_; }
  // The calls that graphs have recorded; while one of those exists, the memory must stay mapped.
  Captures& captures() { return captures_; }

 protected:
  // On the current device. `aborted` and `words` lie in this rank's memory.
  Communicator(uint32_t world, uint32_t rank, uint32_t* aborted, StateWord* words,
               uint32_t words_count);
  // What every wait of a kernel of call `op` needs.
  gpu::SpinContext spin(uint32_t op = 0) const {
    gpu::SpinContext context = spin_;
    context.op = op;
    return context;
  }
  // The sentences of errors: what the call was, and what more there is to say of a wait.
  virtual std::string call_of(const gpu::SpinReport& report) const = 0;
  virtual std::string wait_of(const gpu::SpinReport& report) const = 0;

 private:
  [[noreturn]] void fail() const;

  gpu::SpinContext spin_;
  uint32_t world_;
  int device_ = 0;
  gpu::SpinReport* report_ = nullptr;  // pinned
  Captures captures_;
};

// Throws unless the world size is one of `worlds` and the rank below it.
void check_rank(const std::vector<char*>& bases, int rank, const std::vector<int>& worlds);

// A new handle; the caller's from here on.
int64_t add(std::shared_ptr<Communicator> communicator);
// Throws InvalidArgumentError for what is no open handle.
std::shared_ptr<Communicator> find(int64_t handle);
void remove(int64_t handle);

// The same, of one kind: CustomAllReduce or quick::QuickAllReduce.
template <class Kind>
std::shared_ptr<Kind> find_as(int64_t handle) {
  auto found = std::dynamic_pointer_cast<Kind>(find(handle));
  if (!found) {
    prim::fail(prim::kInvalid, handle, " is no handle of a ", Kind::kName);
  }
  return found;
}

}  // namespace collectives
