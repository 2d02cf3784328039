// Waiting on another GPU, never for ever: each wait has a deadline, and the first one that misses
// it leaves a report where the host reads it without a CUDA call. The kernel then ends normally, so
// the CUDA context stays usable.
#pragma once

#include <cstdint>

#include "prim/gpu_memory.h"

namespace gpu {

enum SpinCode : uint32_t { kSpinNone = 0, kSpinLate = 1, kSpinBusy = 2 };

// In pinned host memory. `code` is written last, by the one thread that won `aborted`.
struct SpinReport {
  uint32_t code;
  uint32_t op;
  uint32_t rank;
  uint32_t peer;
  uint64_t epoch;
  uint64_t position;  // of the word that did not come: vector index, or block of a counter
  uint64_t expected;
  uint64_t seen;
  uint64_t waited_ns;
};

// What every wait of one kernel launch needs.
struct SpinContext {
  uint32_t* aborted;   // in this rank's device memory; 0 at rest, 1 once anything failed
  ulonglong2* copies;  // whose second halves are set then too, for kernels that start later
  uint32_t copies_count;
  SpinReport* report;  // device address of pinned host memory
  uint64_t timeout_ns;
  uint32_t op;
  uint32_t rank;
};

// The first failure of a workspace is reported; later ones are its consequences.
GPU_COLD inline void report_once(const SpinContext& context, SpinCode code, uint32_t peer,
                                 uint64_t epoch, uint64_t position, uint64_t expected,
                                 uint64_t seen, uint64_t waited_ns) {
  if (atomicExch(context.aborted, 1u) != 0) return;
  for (uint32_t i = 0; i < context.copies_count; ++i) {
    reinterpret_cast<volatile ulonglong2*>(context.copies)[i].y = 1;
  }
  volatile SpinReport* report = context.report;
  report->op = context.op;
  report->rank = context.rank;
  report->peer = peer;
  report->epoch = epoch;
  report->position = position;
  report->expected = expected;
  report->seen = seen;
  report->waited_ns = waited_ns;
  fence_sys();
  report->code = code;
}

// One thread's waits in one kernel. Per wait: begin(), then give_up() after every poll that failed.
// Once it gave up, every later wait gives up at its first poll, so the kernel ends soon.
class Spin {
 public:
  __device__ __forceinline__ void begin() { start_ = 0; }

  __device__ __forceinline__ bool give_up(const SpinContext& context, uint32_t peer, uint64_t epoch,
                                          uint64_t position, uint64_t expected, uint64_t seen) {
    if (gave_up_) return true;
    if (++polls_ & 127) return false;
    gave_up_ = look_at_clock(context, peer, epoch, position, expected, seen);
    return gave_up_;
  }

 private:
  __device__ __forceinline__ bool look_at_clock(const SpinContext& context, uint32_t peer,
                                                uint64_t epoch, uint64_t position,
                                                uint64_t expected, uint64_t seen) {
    if (ld_relaxed_sys(context.aborted) != 0) return true;
    const uint64_t now = clock_ns();
    if (start_ == 0) start_ = now;
    if (now - start_ < context.timeout_ns) return false;
    report_once(context, kSpinLate, peer, epoch, position, expected, seen, now - start_);
    return true;
  }

  uint64_t start_ = 0;
  uint32_t polls_ = 0;
  bool gave_up_ = false;
};

// Waits until a counter that others only raise has reached `least`; false when it gave up.
// Differences are compared, so the counter may wrap.
__device__ __forceinline__ bool wait_acquire(Spin& spin, const SpinContext& context,
                                             const uint64_t* counter, uint64_t least, uint32_t peer,
                                             uint64_t epoch, uint64_t position) {
  spin.begin();
  for (;;) {
    const uint64_t seen = ld_acquire_sys(counter);
    if (static_cast<int64_t>(seen - least) >= 0) return true;
    if (spin.give_up(context, peer, epoch, position, least, seen)) return false;
  }
}

}  // namespace gpu
