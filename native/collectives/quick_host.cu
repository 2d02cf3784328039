// The host side of the quantized all-reduce.
#include <algorithm>

#include "collectives/quick_all_reduce.h"
#include "prim/gpu_launch.h"

namespace quick {

View QuickAllReduce::over(const std::vector<char*>& bases, int rank, uint64_t area_bytes) {
  collectives::check_rank(bases, rank, {2, 4, 8});
  View view{};
  std::copy(bases.begin(), bases.end(), view.base);
  view.area_bytes = area_bytes & ~uint64_t{127};
  view.rank = static_cast<uint32_t>(rank);
  if (tiles_at_once(view, static_cast<uint32_t>(bases.size()), Codec::kFp) == 0) {
    prim::fail(prim::kInvalid, "an area of ", area_bytes, " bytes holds no tile of ", kTileBytes);
  }
  return view;
}

QuickAllReduce::QuickAllReduce(const View& view, uint32_t world)
    : Communicator(world, view.rank, &view.control(view.rank).aborted,
                   view.control(view.rank).words, kMaxBlocks),
      view_(view),
      world_(world),
      processors_(gpu::multiprocessors(device())),
      can_overlap_(gpu::has_dependent_launch(device())),
      overlap_(can_overlap_) {}

std::string QuickAllReduce::wait_of(const gpu::SpinReport& report) const {
  return prim::text("message ", report.position, "; the codec must be the same, too");
}

void QuickAllReduce::set_shape(int blocks, int threads, int ahead) {
  const bool warps =
      threads == 0 || threads == 32 || threads == 64 || threads == 128 || threads == kMaxThreads;
  if (blocks < 0 || blocks > kMaxBlocks || !warps || ahead < 0 || ahead > 64) {
    prim::fail(prim::kInvalid, blocks, " blocks of ", threads, " threads, ", ahead,
               " messages ahead: at most ", kMaxBlocks,
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

void QuickAllReduce::run(Codec codec, DType dtype, const void* inp, void* out, uint64_t bytes,
                         gpu::Stream stream) {
  check();
  if (bytes == 0) return;
  captures().note(stream, static_cast<uint64_t>(codec), static_cast<uint64_t>(dtype), bytes);
  View view = view_;
  view.spin = spin();
  const uint64_t most = tiles_at_once(view_, world_, codec) * kTileBytes;
  for (uint64_t begin = 0; begin < bytes; begin += most) {
    const uint64_t part = std::min(bytes - begin, most);
    all_reduce(view, world_, codec, dtype, static_cast<const char*>(inp) + begin,
               static_cast<char*>(out) + begin, part,
               shape(codec, (part + kTileBytes - 1) / kTileBytes), stream);
  }
}

}  // namespace quick
