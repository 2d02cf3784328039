// The host side of the quantized all-reduce, and its C interface, called through ctypes. Functions
// return 0 or a quick::Failure; communicators_qr_error() is then the sentence, for the calling
// thread.
#include <algorithm>
#include <exception>
#include <string>

#include "collectives/quick_all_reduce.h"
#include "prim/gpu_launch.h"
#include "prim/text.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace quick {

QuickAllReduce::QuickAllReduce(const std::vector<char*>& bases, int rank, uint64_t area_bytes)
    : world_(static_cast<uint32_t>(bases.size())) {
  if (world_ != 2 && world_ != 4 && world_ != 8) {
    throw Error(Failure::kArgument,
                "the world size is " + std::to_string(world_) + "; it must be 2, 4 or 8");
  }
  if (rank < 0 || rank >= static_cast<int>(world_)) {
    throw Error(Failure::kArgument,
                "rank " + std::to_string(rank) + " is not in 0.." + std::to_string(world_ - 1));
  }
  for (uint32_t r = 0; r < world_; ++r) view_.base[r] = bases[r];
  view_.area_bytes = area_bytes & ~uint64_t{127};
  view_.rank = static_cast<uint32_t>(rank);
  if (tiles_at_once(view_, world_, Codec::kFp) == 0) {
    throw Error(Failure::kArgument, "an area of " + std::to_string(area_bytes) +
                                        " bytes holds no tile of " + std::to_string(kTileBytes));
  }
  GPU_CHECK(GPU_NAME(GetDevice)(&device_));
  can_overlap_ = overlap_ = gpu::has_dependent_launch(device_);
  processors_ = gpu::multiprocessors(device_);
  void* pinned = nullptr;
  GPU_CHECK(GPU_NAME(HostAlloc)(&pinned, sizeof(gpu::SpinReport), GPU_NAME(HostAllocMapped)));
  report_ = new (pinned) gpu::SpinReport{};
  try {
    void* seen_by_device = nullptr;
    GPU_CHECK(GPU_NAME(HostGetDevicePointer)(&seen_by_device, pinned, 0));
    Control& control = view_.control(view_.rank);
    view_.spin.aborted = &control.aborted;
    view_.spin.copies = reinterpret_cast<ulonglong2*>(control.words);
    view_.spin.copies_count = kMaxBlocks;
    view_.spin.report = static_cast<gpu::SpinReport*>(seen_by_device);
    view_.spin.timeout_ns = uint64_t{300} * 1000000000;
    view_.spin.rank = view_.rank;
  } catch (...) {
    (void)GPU_NAME(FreeHost)(pinned);
    throw;
  }
}

// The caller has seen to it that no kernel of ours is in flight.
QuickAllReduce::~QuickAllReduce() { (void)GPU_NAME(FreeHost)(report_); }

void QuickAllReduce::set_shape(int blocks, int threads, int ahead) {
  const bool warps =
      threads == 0 || threads == 32 || threads == 64 || threads == 128 || threads == kMaxThreads;
  if (blocks < 0 || blocks > kMaxBlocks || !warps || ahead < 0 || ahead > 64) {
    throw Error(Failure::kArgument, std::to_string(blocks) + " blocks of " +
                                        std::to_string(threads) + " threads, " +
                                        std::to_string(ahead) + " messages ahead: at most " +
                                        std::to_string(kMaxBlocks) +
                                        " of 32, 64, 128 or 256 threads and 64 are accepted");
  }
  blocks_ = blocks;
  threads_ = threads;
  ahead_ = ahead;
}

// What two H200 did best with (docs/benchmarks/quick_all_reduce.md).
Launch QuickAllReduce::shape(Codec codec, uint64_t tiles) const {
  // Few messages take small blocks, to reach all multiprocessors. Many messages of Q4's few bits
  // are quicker with half of the threads.
  const uint64_t messages = tiles * messages_of_tile(world_);
  const uint64_t of_each = messages / processors_;  // multiprocessors
  const int few = of_each < 128 ? 64 : 128;
  const int threads = threads_ > 0 ? threads_ : few;
  const int of_processor = codec == Codec::kQ4 && of_each > 1024 ? 256 : 512;
  const int blocks =
      blocks_ > 0 ? blocks_ : std::min(processors_ * of_processor / threads, kMaxBlocks);
  return {blocks, threads, ahead_ > 0 ? ahead_ : 1, overlap_};
}

void QuickAllReduce::run(Codec codec, Half half, const void* inp, void* out, uint64_t bytes,
                         gpu::Stream stream) {
  check();
  if (bytes == 0) return;
  captures_.note(stream, static_cast<uint64_t>(codec), static_cast<uint64_t>(half), bytes);
  const uint64_t most = tiles_at_once(view_, world_, codec) * kTileBytes;
  for (uint64_t begin = 0; begin < bytes; begin += most) {
    const uint64_t part = std::min(bytes - begin, most);
    all_reduce(view_, world_, codec, half, static_cast<const char*>(inp) + begin,
               static_cast<char*>(out) + begin, part,
               shape(codec, (part + kTileBytes - 1) / kTileBytes), stream);
  }
}

void QuickAllReduce::check() const {
  if (const_cast<const volatile gpu::SpinReport*>(report_)->code == gpu::kSpinNone) return;
  const gpu::SpinReport& report = *report_;
  const std::string call = prim::text("quick_all_reduce number ", report.epoch, " on rank ",
                                      report.rank, " of ", world_);
  if (report.code == gpu::kSpinBusy) {
    throw Error(Failure::kBusy, call +
                                    " found another call in flight on the same buffer; calls on "
                                    "two streams must be ordered by an event");
  }
  throw Error(Failure::kTimeout,
              prim::text(call, " waited ", static_cast<double>(report.waited_ns) * 1e-9,
                         " s for rank ", report.peer, " (message ", report.position,
                         "); ranks must make the same calls with the same sizes and codec"));
}

void QuickAllReduce::retire() {
  const uint32_t yes = 1;
  Control& control = view_.control(view_.rank);
  GPU_CHECK(GPU_NAME(DeviceSynchronize)());
  GPU_CHECK(GPU_NAME(Memcpy)(&control.aborted, &yes, sizeof(yes), GPU_NAME(MemcpyHostToDevice)));
  // Any value but zero will do for the copies.
  GPU_CHECK(GPU_NAME(Memset2D)(&control.words[0].aborted, sizeof(StateWord), 1, sizeof(uint64_t),
                               kMaxBlocks));
  GPU_CHECK(GPU_NAME(DeviceSynchronize)());
}

}  // namespace quick

namespace {

thread_local std::string last_error;

template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const quick::Error& error) {
    last_error = error.what();
    return static_cast<int>(error.failure);
  } catch (const std::exception& error) {
    last_error = error.what();
    return static_cast<int>(quick::Failure::kPlatform);
  }
}

quick::QuickAllReduce& of(void* handle) { return *static_cast<quick::QuickAllReduce*>(handle); }

}  // namespace

EXPORTED const char* communicators_qr_error() { return last_error.c_str(); }

EXPORTED uint64_t communicators_qr_bytes(uint64_t area) {
  return quick::QuickAllReduce::buffer_bytes(area);
}

EXPORTED int communicators_qr_create(void** handle, const uint64_t* bases, int world, int rank,
                                     uint64_t area) {
  return guarded([&] {
    std::vector<char*> addresses;
    for (int r = 0; r < world; ++r) addresses.push_back(reinterpret_cast<char*>(bases[r]));
    *handle = new quick::QuickAllReduce(addresses, rank, area);
  });
}

EXPORTED void communicators_qr_destroy(void* handle) { delete &of(handle); }

EXPORTED int communicators_qr_retire(void* handle) {
  return guarded([&] {
    const gpu::DeviceGuard guard(of(handle).device());
    of(handle).retire();
  });
}

// How many calls graphs have recorded since the last time this was asked, and a digest of them.
EXPORTED void communicators_qr_captured(void* handle, uint64_t* calls, uint64_t* digest) {
  of(handle).captures().take(calls, digest);
}

// Graphs that exist and have recorded calls. While there are any, only retire() may end a handle.
EXPORTED int communicators_qr_graphs(void* handle) { return of(handle).captures().graphs(); }

EXPORTED int communicators_qr_all_reduce(void* handle, int codec, int bfloat16, const void* inp,
                                         void* out, uint64_t bytes, void* stream) {
  return guarded([&] {
    const gpu::DeviceGuard guard(of(handle).device());
    of(handle).run(static_cast<quick::Codec>(codec),
                   bfloat16 != 0 ? quick::Half::kBFloat16 : quick::Half::kFloat16, inp, out, bytes,
                   static_cast<gpu::Stream>(stream));
  });
}

EXPORTED int communicators_qr_check(void* handle) {
  return guarded([&] { of(handle).check(); });
}

EXPORTED void communicators_qr_set_timeout_ns(void* handle, uint64_t timeout_ns) {
  of(handle).set_timeout_ns(timeout_ns);
}

// Zeros: the defaults. All ranks of one GPU must fit on it together.
EXPORTED int communicators_qr_set_launch(void* handle, int blocks, int threads, int ahead,
                                         int overlap) {
  return guarded([&] {
    of(handle).set_shape(blocks, threads, ahead);
    of(handle).set_overlap(overlap != 0);
  });
}
