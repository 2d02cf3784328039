#include <algorithm>
#include <new>

#include "collectives/communicator.h"
#include "prim/handles.h"

namespace collectives {
namespace {

// Never destroyed: a thread may be in a call while the process ends.
prim::Handles<Communicator>& handles() {
  static auto& all = *new prim::Handles<Communicator>;
  return all;
}

[[noreturn]] void no_handle(int64_t handle) {
  prim::fail(prim::kInvalid, handle, " is no open handle of GPU collectives");
}

}  // namespace

Communicator::Communicator(uint32_t world, uint32_t rank, uint32_t* aborted, StateWord* words,
                           uint32_t words_count)
    : world_(world) {
  GPU_CHECK(GPU_NAME(GetDevice)(&device_));
  void* pinned = nullptr;
  GPU_CHECK(GPU_NAME(HostAlloc)(&pinned, sizeof(gpu::SpinReport), GPU_NAME(HostAllocMapped)));
  report_ = new (pinned) gpu::SpinReport{};
  void* seen_by_device = nullptr;
  const gpu::Error error = GPU_NAME(HostGetDevicePointer)(&seen_by_device, pinned, 0);
  if (error != gpu::kSuccess) (void)GPU_NAME(FreeHost)(pinned);
  gpu::check(error, "HostGetDevicePointer", __FILE__, __LINE__);
  spin_ = {aborted,
           reinterpret_cast<ulonglong2*>(words),
           words_count,
           static_cast<gpu::SpinReport*>(seen_by_device),
           uint64_t{300} * 1000000000,
           0,
           rank};
}

Communicator::~Communicator() { (void)GPU_NAME(FreeHost)(report_); }

void Communicator::retire() {
  const uint32_t yes = 1;
  GPU_CHECK(GPU_NAME(DeviceSynchronize)());
  GPU_CHECK(GPU_NAME(Memcpy)(spin_.aborted, &yes, sizeof(yes), GPU_NAME(MemcpyHostToDevice)));
  // Any value but zero will do for the copies in the state words.
  GPU_CHECK(GPU_NAME(Memset2D)(&spin_.copies->y, sizeof(StateWord), 1, sizeof(uint64_t),
                               spin_.copies_count));
  GPU_CHECK(GPU_NAME(DeviceSynchronize)());
}

void Communicator::fail() const {
  const gpu::SpinReport& report = *report_;
  const std::string call = prim::text(call_of(report), " number ", report.epoch, " on rank ",
                                      report.rank, " of ", world_);
  if (report.code == gpu::kSpinBusy) {
    prim::fail(prim::kFailed, call,
               " found another call in flight on the same memory; calls on two streams must be "
               "ordered by an event");
  }
  prim::fail(prim::kTimeout, call, " waited ", static_cast<double>(report.waited_ns) * 1e-9,
             " s for rank ", report.peer, " (", wait_of(report),
             "); ranks must make the same calls with the same sizes");
}

void check_rank(const std::vector<char*>& bases, int rank, const std::vector<int>& worlds) {
  const int world = static_cast<int>(bases.size());
  if (std::find(worlds.begin(), worlds.end(), world) == worlds.end()) {
    std::string accepted;
    for (const int one : worlds) accepted += (accepted.empty() ? "" : ", ") + std::to_string(one);
    prim::fail(prim::kInvalid, "the world size is ", world, "; the kernels are made for ",
               accepted);
  }
  prim::require(rank >= 0 && rank < world, "rank ", rank, " is not in 0..", world - 1);
}

int64_t add(std::shared_ptr<Communicator> communicator) {
  return handles().add(std::move(communicator));
}

std::shared_ptr<Communicator> find(int64_t handle) {
  auto found = handles().get(handle);
  if (!found) no_handle(handle);
  return found;
}

void remove(int64_t handle) {
  if (!handles().remove(handle)) no_handle(handle);
}

}  // namespace collectives
