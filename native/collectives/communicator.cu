#include <algorithm>
#include <cstring>

#include "collectives/communicator.h"
#include "collectives/dispatch.h"
#include "prim/gpu_launch.h"
#include "prim/text.h"

namespace collectives {
namespace {

constexpr const char* kOps[] = {"all_reduce", "all_gather", "reduce_scatter"};
enum Op : uint32_t { kAllReduce = 0, kAllGather = 1, kReduceScatter = 2 };

Tuning default_tuning(uint32_t world) {
  Tuning tuning;
  tuning.one_shot_most = world == 2 ? 16u << 20 : (1024 * 1024) / (world - 1);
  tuning.gather_small_most = 128 * 1024 / (world - 1);
  return tuning;
}

}  // namespace

Communicator::Communicator(const std::vector<char*>& bases, int rank, const Layout& layout) {
  const int world = static_cast<int>(bases.size());
  if (world != 2 && world != 4 && world != 6 && world != 8) {
    throw Error(Failure::kArgument, "the world size is " + std::to_string(world) +
                                        "; the kernels are made for 2, 4, 6 and 8");
  }
  if (rank < 0 || rank >= world) {
    throw Error(Failure::kArgument,
                "rank " + std::to_string(rank) + " is not in 0.." + std::to_string(world - 1));
  }
  for (int r = 0; r < world; ++r) ws_.base[r] = bases[r];
  ws_.layout = layout;
  ws_.rank = static_cast<uint32_t>(rank);
  ws_.world = static_cast<uint32_t>(world);
  const auto area = [&](uint64_t size) { return size / (world - 1) & ~uint64_t{255}; };
  ws_.slot_stride = area(layout.slot);
  ws_.tagged_stride = area(layout.tagged);
  ws_.bulk_stride = area(layout.bulk);
  ws_.finish();
  tuning_ = default_tuning(ws_.world);
  GPU_CHECK(GPU_NAME(GetDevice)(&device_));
  programmatic_launch_ = gpu::has_dependent_launch(device_);
  void* pinned = nullptr;
  GPU_CHECK(GPU_NAME(HostAlloc)(&pinned, sizeof(gpu::SpinReport), cudaHostAllocMapped));
  report_ = new (pinned) gpu::SpinReport{};
  try {
    void* seen_by_device = nullptr;
    GPU_CHECK(GPU_NAME(HostGetDevicePointer)(&seen_by_device, pinned, 0));
    ws_.spin = {&ws_.mine().aborted,
                reinterpret_cast<ulonglong2*>(ws_.mine().words),
                kStateWords,
                static_cast<gpu::SpinReport*>(seen_by_device),
                uint64_t{300} * 1000000000,
                0,
                ws_.rank};
    GPU_CHECK(GPU_NAME(Memset)(ws_.base[rank] + layout.slot_offset(0), 0xff, 2 * layout.slot));
    GPU_CHECK(GPU_NAME(DeviceSynchronize)());
    const uint32_t alive = 1;
    for (int r = 0; r < world; ++r) {
      GPU_CHECK(GPU_NAME(Memcpy)(&ws_.control(r).alive[rank], &alive, sizeof(alive),
                                 GPU_NAME(MemcpyHostToDevice)));
    }
    GPU_CHECK(GPU_NAME(DeviceSynchronize)());
  } catch (...) {
    (void)GPU_NAME(FreeHost)(pinned);
    throw;
  }
}

Communicator::~Communicator() {
  // The caller has seen to it that no kernel of ours is in flight.
  (void)GPU_NAME(FreeHost)(report_);
}

Workspace Communicator::workspace(uint32_t op, DType dtype, uint64_t bytes, gpu::Stream stream) {
  Workspace ws = ws_;
  ws.spin.op = op;
  const bool recorded = captures_.note(stream, op, static_cast<uint64_t>(dtype), bytes);
  if (!met_) {
    meet(ws, stream);
    met_ = !recorded;  // a graph may be replayed late or never
  }
  return ws;
}

void Communicator::check() const {
  if (const_cast<const volatile gpu::SpinReport*>(report_)->code != gpu::kSpinNone) throw_report();
}

void Communicator::retire() {
  const uint32_t yes = 1;
  GPU_CHECK(GPU_NAME(DeviceSynchronize)());
  GPU_CHECK(GPU_NAME(Memcpy)(&ws_.mine().aborted, &yes, sizeof(yes), GPU_NAME(MemcpyHostToDevice)));
  // Any value but zero will do for the copies in the state words.
  GPU_CHECK(GPU_NAME(Memset2D)(&ws_.mine().words[0].aborted, sizeof(StateWord), 1, sizeof(uint64_t),
                               kStateWords));
  GPU_CHECK(GPU_NAME(DeviceSynchronize)());
}

void Communicator::throw_report() const {
  const gpu::SpinReport& report = *report_;
  const std::string call = prim::text(report.op < 3 ? kOps[report.op] : "a collective", " number ",
                                      report.epoch, " on rank ", report.rank, " of ", ws_.world);
  if (report.code == gpu::kSpinBusy) {
    throw Error(Failure::kBusy, call +
                                    " found another call in flight on the same workspace; calls "
                                    "on two streams must be ordered by an event");
  }
  throw Error(
      Failure::kTimeout,
      prim::text(call, " waited ", static_cast<double>(report.waited_ns) * 1e-9, " s for rank ",
                 report.peer, " (at position ", report.position, ", expected ",
                 report.expected == 0 ? "data" : std::to_string(report.expected), ", saw ",
                 report.seen, "); ranks must make the same calls with the same sizes"));
}

Algorithm Communicator::algorithm_for(uint64_t bytes) const {
  Algorithm algorithm = tuning_.forced;
  if (algorithm == Algorithm::kAutomatic) {
    algorithm = bytes <= tuning_.one_shot_most ? Algorithm::kOneShot : Algorithm::kStreamed;
  }
  // The message and the world must be right for it.
  if (algorithm == Algorithm::kStreamed && ws_.world != 2) algorithm = Algorithm::kTwoShot;
  if (algorithm == Algorithm::kTwoShot && vectors_of(bytes) < ws_.world) {
    algorithm = Algorithm::kOneShot;
  }
  return algorithm;
}

void Communicator::all_reduce(DType dtype, const void* inp, void* out, uint64_t bytes,
                              gpu::Stream stream) {
  check();
  if (bytes == 0) return;
  const Workspace ws = workspace(kAllReduce, dtype, bytes, stream);
  Shape shape = tuning_.shape;
  shape.overlap = shape.overlap && programmatic_launch_;
  const Algorithm algorithm = algorithm_for(bytes);
  if (algorithm == Algorithm::kStreamed) {
    return all_reduce_streamed(ws, dtype, inp, out, bytes, shape, stream);
  }
  const bool one_shot = algorithm == Algorithm::kOneShot;
  const uint64_t limit = one_shot ? one_shot_limit(ws) : two_shot_limit(ws);
  uint64_t begin = 0;
  while (begin < bytes) {
    uint64_t size = std::min(bytes - begin, limit);
    const char* from = static_cast<const char*>(inp) + begin;
    char* to = static_cast<char*>(out) + begin;
    // The rest may be too short for a slice a rank.
    if (one_shot || vectors_of(size) < ws_.world) {
      size = std::min(size, one_shot_limit(ws));
      all_reduce_one_shot(ws, dtype, from, to, size, shape, stream);
    } else {
      all_reduce_two_shot(ws, dtype, from, to, size, shape, stream);
    }
    begin += size;
  }
}

void Communicator::all_gather(const void* inp, void* out, uint64_t bytes, gpu::Stream stream) {
  check();
  const Workspace ws = workspace(kAllGather, DType{}, bytes, stream);
  Shape shape = tuning_.shape;
  shape.overlap = shape.overlap && programmatic_launch_;
  const bool small = bytes <= std::min(tuning_.gather_small_most, all_gather_small_limit(ws));
  const uint64_t limit = small ? all_gather_small_limit(ws) : all_gather_limit(ws);
  for (uint64_t begin = 0; begin < bytes; begin += limit) {
    const uint64_t size = std::min(bytes - begin, limit);
    const char* from = static_cast<const char*>(inp) + begin;
    char* to = static_cast<char*>(out) + begin;
    (small ? all_gather_small : all_gather_bulk)(ws, from, to, size, bytes, shape, stream);
  }
}

void Communicator::reduce_scatter(DType dtype, const void* inp, void* out, uint64_t bytes,
                                  gpu::Stream stream) {
  check();
  const Workspace ws = workspace(kReduceScatter, dtype, bytes, stream);
  Shape shape = tuning_.shape;
  shape.overlap = shape.overlap && programmatic_launch_;
  const uint64_t limit = reduce_scatter_limit(ws);
  for (uint64_t begin = 0; begin < bytes; begin += limit) {
    const uint64_t size = std::min(bytes - begin, limit);
    reduce_scatter_push(ws, dtype, static_cast<const char*>(inp) + begin,
                        static_cast<char*>(out) + begin, size, bytes, shape, stream);
  }
}

void Communicator::tune(const std::string& name, int64_t value) {
  if (value < 0) throw Error(Failure::kArgument, "tune(" + name + "): the value is negative");
  const auto number = static_cast<int>(value);
  if (name == "algorithm" && number <= static_cast<int>(Algorithm::kTwoShot)) {
    tuning_.forced = static_cast<Algorithm>(number);
  } else if (name == "gather_small_most") {
    tuning_.gather_small_most = static_cast<uint64_t>(value);
  } else if (name == "blocks") {
    tuning_.shape.blocks = number;
  } else if (name == "other_blocks" && number <= kMaxBlocks) {
    tuning_.shape.other_blocks = number;
  } else if (name == "overlap") {
    tuning_.shape.overlap = number != 0;
  } else {
    throw Error(Failure::kArgument,
                "tune(" + name + ", " + std::to_string(value) + "): no such name or value");
  }
}

}  // namespace collectives
