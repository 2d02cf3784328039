#include <algorithm>

#include "collectives/custom_all_reduce.h"
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

Workspace CustomAllReduce::over(const std::vector<char*>& bases, int rank, const Layout& layout) {
  check_rank(bases, rank, {2, 4, 6, 8});
  Workspace ws{};
  std::copy(bases.begin(), bases.end(), ws.base);
  ws.layout = layout;
  ws.rank = static_cast<uint32_t>(rank);
  ws.world = static_cast<uint32_t>(bases.size());
  const auto area = [&](uint64_t size) { return size / (ws.world - 1) & ~uint64_t{255}; };
  ws.slot_stride = area(layout.slot);
  ws.ll_stride = area(layout.ll);
  ws.bulk_stride = area(layout.bulk);
  ws.finish();
  return ws;
}

CustomAllReduce::CustomAllReduce(const Workspace& ws)
    : Communicator(ws.world, ws.rank, &ws.mine().aborted, ws.mine().words, kStateWords),
      ws_(ws),
      tuning_(default_tuning(ws.world)),
      programmatic_launch_(gpu::has_dependent_launch(device())) {
  GPU_CHECK(
      GPU_NAME(Memset)(ws_.base[ws_.rank] + ws_.layout.slot_offset(0), 0xff, 2 * ws_.layout.slot));
  GPU_CHECK(GPU_NAME(DeviceSynchronize)());
  const uint32_t alive = 1;
  for (uint32_t r = 0; r < ws_.world; ++r) {
    GPU_CHECK(GPU_NAME(Memcpy)(&ws_.control(r).alive[ws_.rank], &alive, sizeof(alive),
                               GPU_NAME(MemcpyHostToDevice)));
  }
  GPU_CHECK(GPU_NAME(DeviceSynchronize)());
}

Workspace CustomAllReduce::workspace(uint32_t op, DType dtype, uint64_t bytes, gpu::Stream stream) {
  Workspace ws = ws_;
  ws.spin = spin(op);
  const bool recorded = captures().note(stream, op, static_cast<uint64_t>(dtype), bytes);
  if (!met_) {
    meet(ws, stream);
    met_ = !recorded;  // a graph may be replayed late or never
  }
  return ws;
}

std::string CustomAllReduce::call_of(const gpu::SpinReport& report) const {
  return report.op < 3 ? kOps[report.op] : "a collective";
}

std::string CustomAllReduce::wait_of(const gpu::SpinReport& report) const {
  return prim::text("at position ", report.position, ", expected ",
                    report.expected == 0 ? "data" : std::to_string(report.expected), ", saw ",
                    report.seen);
}

Algorithm CustomAllReduce::algorithm_for(uint64_t bytes) const {
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

void CustomAllReduce::all_reduce(DType dtype, const void* inp, void* out, uint64_t bytes,
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

void CustomAllReduce::all_gather(const void* inp, void* out, uint64_t bytes, gpu::Stream stream) {
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

void CustomAllReduce::reduce_scatter(DType dtype, const void* inp, void* out, uint64_t bytes,
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

void CustomAllReduce::tune(const std::string& name, int64_t value) {
  if (value < 0) prim::fail(prim::kInvalid, "tune(", name, "): the value is negative");
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
    prim::fail(prim::kInvalid, "tune(", name, ", ", value, "): no such name or value");
  }
}

}  // namespace collectives
