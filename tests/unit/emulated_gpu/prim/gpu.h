// Stands in for native/prim/gpu.h: the kernels of native/collectives compiled for the CPU, one
// thread a GPU thread. Scheduling is the operating system's, which is far less orderly than a
// GPU's.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "prim/gpu_runtime.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define GPU_COLD
#define COMMUNICATORS_HIP 0
#define __grid_constant__
#define __launch_bounds__(...)
#define GPU_NAME(name) emulated_##name
#define GPU_NAME_OF_CAPTURE_INFO emulated_StreamGetCaptureInfo
#define GPU_CHECK(call) (void)(call)

struct Dim {
  uint32_t x;
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }

inline thread_local Dim threadIdx, blockIdx, blockDim, gridDim;
inline thread_local std::barrier<>* block_barrier = nullptr;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
// Of a block that is one warp.
inline thread_local uint32_t* warp_words = nullptr;
inline uint32_t exchange(uint32_t value, uint32_t lane) {
  warp_words[threadIdx.x] = value;
  block_barrier->arrive_and_wait();
  const uint32_t result = warp_words[lane];
  block_barrier->arrive_and_wait();
  return result;
}
inline uint32_t max_halves(uint32_t a, uint32_t b, auto type) {
  using T = decltype(type);
  const T low = std::max(static_cast<T>(a), static_cast<T>(b));
  const T high = std::max(static_cast<T>(a >> 16), static_cast<T>(b >> 16));
  return static_cast<uint16_t>(low) | static_cast<uint32_t>(static_cast<uint16_t>(high)) << 16;
}
inline uint32_t __vmaxs2(uint32_t a, uint32_t b) { return max_halves(a, b, int16_t{}); }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) { return max_halves(a, b, uint16_t{}); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint32_t atomicExch(uint32_t* address, uint32_t value) {
  return std::atomic_ref(*address).exchange(value);
}

namespace gpu {
using Stream = void*;
using Error = int;
inline constexpr Error kSuccess = 0;

inline void check(int, const char*, const char*, int) {}
inline bool has_dependent_launch(int) { return false; }
inline int multiprocessors(int) { return 1; }

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

struct LaunchConfig {
  int blocks;
  int threads;
  Stream stream;
  bool overlap;
};

// Runs a grid on the calling rank and returns when all of its blocks have ended; on a stream that
// is captured it is kept for the replays of the graph.
template <auto kernel, typename... Arguments>
void launch(const LaunchConfig& config, const char* name, Arguments... arguments) {
  if (emulated::Graph* graph = emulated::graph_of(config.stream)) {
    LaunchConfig later = config;
    later.stream = nullptr;
    graph->launches.push_back([=] { launch<kernel>(later, name, arguments...); });
    return;
  }
  std::vector<std::unique_ptr<std::barrier<>>> barriers;
  std::vector<uint32_t> words(static_cast<size_t>(config.blocks) * config.threads);
  std::vector<std::jthread> threads;
  for (int b = 0; b < config.blocks; ++b) {
    barriers.push_back(std::make_unique<std::barrier<>>(config.threads));
    for (int t = 0; t < config.threads; ++t) {
      threads.emplace_back([=, barrier = barriers.back().get(),
                            first = &words[static_cast<size_t>(b) * config.threads]] {
        warp_words = first;
        threadIdx = {static_cast<uint32_t>(t)};
        blockIdx = {static_cast<uint32_t>(b)};
        blockDim = {static_cast<uint32_t>(config.threads)};
        gridDim = {static_cast<uint32_t>(config.blocks)};
        block_barrier = barrier;
        kernel(arguments...);
        barrier->arrive_and_drop();
      });
    }
  }
}
}  // namespace gpu
