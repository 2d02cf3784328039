// A chain of dependent loads: nothing overlaps, so its length over its time is one load's latency.
#include <vector>

#include "collectives/load_latency.h"
#include "prim/gpu.h"

namespace collectives {
namespace {

constexpr int64_t kLineWords = 32;   // 128 bytes, one cache line
constexpr int64_t kStrideLines = 7;  // coprime to any power of two: every line is visited

// Volatile: each load goes to where the memory is, past this GPU's first-level cache.
__global__ void chase(const volatile uint32_t* memory, int hops, uint32_t* end) {
  uint32_t at = 0;
  for (int hop = 0; hop < hops; ++hop) at = memory[at];
  *end = at;  // a result, or the loop would be left out
}

// What must be given back, in whatever way the function is left.
struct Timer {
  GPU_NAME(Event_t) start = nullptr, stop = nullptr;
  uint32_t* end = nullptr;
  ~Timer() {
    if (start != nullptr) (void)GPU_NAME(EventDestroy)(start);
    if (stop != nullptr) (void)GPU_NAME(EventDestroy)(stop);
    if (end != nullptr) (void)GPU_NAME(Free)(end);
  }
};

}  // namespace

float load_latency_us(uint32_t* memory, int64_t bytes, int hops) {
  const int64_t words = bytes / static_cast<int64_t>(sizeof(uint32_t));
  const int64_t lines = words / kLineWords;
  std::vector<uint32_t> chain(static_cast<size_t>(words), 0);
  for (int64_t line = 0; line < lines; ++line) {
    chain[static_cast<size_t>(line * kLineWords)] =
        static_cast<uint32_t>((line + kStrideLines) % lines * kLineWords);
  }
  GPU_CHECK(GPU_NAME(Memcpy)(memory, chain.data(), chain.size() * sizeof(uint32_t),
                             GPU_NAME(MemcpyDefault)));
  Timer timer;
  GPU_CHECK(GPU_NAME(Malloc)(reinterpret_cast<void**>(&timer.end), sizeof(uint32_t)));
  GPU_CHECK(GPU_NAME(EventCreate)(&timer.start));
  GPU_CHECK(GPU_NAME(EventCreate)(&timer.stop));
  chase<<<1, 1>>>(memory, hops, timer.end);  // translations and clocks warm up
  GPU_CHECK_LAUNCH("load_latency");
  GPU_CHECK(GPU_NAME(EventRecord)(timer.start, nullptr));
  chase<<<1, 1>>>(memory, hops, timer.end);
  GPU_CHECK_LAUNCH("load_latency");
  GPU_CHECK(GPU_NAME(EventRecord)(timer.stop, nullptr));
  GPU_CHECK(GPU_NAME(EventSynchronize)(timer.stop));
  float milliseconds = 0;
  GPU_CHECK(GPU_NAME(EventElapsedTime)(&milliseconds, timer.start, timer.stop));
  return milliseconds * 1e3f / static_cast<float>(hops);
}

}  // namespace collectives
