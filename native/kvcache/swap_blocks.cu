// Whole blocks between a GPU and pinned host memory, on one GPU, or between GPUs. Where one kernel
// can reach both sides it moves all blocks, their numbers in its arguments: no driver call a block,
// no table in device memory. Otherwise the driver copies block by block.
#include <algorithm>
#include <vector>

#include "kvcache/cache.h"
#include "prim/gpu_floats.h"

namespace kvcache {
namespace {

constexpr int kThreads = 256, kUnroll = 4, kPairs = 480;  // arguments of 4 KB at most

struct Pairs {
  uint32_t src[kPairs], dst[kPairs];
};

template <class V>
__global__ void __launch_bounds__(kThreads)
    move_blocks(const V* src, V* dst, int64_t vecs, const __grid_constant__ Pairs pairs) {
  const V* from = src + pairs.src[blockIdx.y] * vecs;
  V* to = dst + pairs.dst[blockIdx.y] * vecs;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; base < vecs;
       base += kUnroll * stride) {
    V v[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * stride < vecs) v[u] = from[base + u * stride];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (base + u * stride < vecs) to[base + u * stride] = v[u];
    }
  }
}

// The address a kernel on the current device may use, or null: device memory of this GPU, or
// pinned host memory.
void* reachable(const void* p) {
  GPU_NAME(PointerAttributes) attributes;
  int current = 0;
  if (GPU_NAME(PointerGetAttributes)(&attributes, p) != gpu::kSuccess) {
    (void)GPU_NAME(GetLastError)();
    return nullptr;
  }
  GPU_CHECK(GPU_NAME(GetDevice)(&current));
  if (attributes.type == GPU_NAME(MemoryTypeDevice) && attributes.device != current) {
    return nullptr;
  }
  if (attributes.type == GPU_NAME(MemoryTypeUnregistered)) return nullptr;
  return attributes.devicePointer;
}

template <class V>
void run(const SwapBlocksArgs& a, const void* src, void* dst, gpu::Stream stream) {
  const int64_t vecs = a.bytes / static_cast<int64_t>(sizeof(V));
  const int64_t steps = gpu::ceil_div(vecs, kThreads * kUnroll);
  for (int64_t first = 0; first < a.n; first += kPairs) {
    const int64_t n = std::min<int64_t>(kPairs, a.n - first);
    Pairs pairs;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t* pair = a.pairs + (first + i) * a.pair_stride;
      pairs.src[i] = static_cast<uint32_t>(pair[0]);
      pairs.dst[i] = static_cast<uint32_t>(pair[a.column_stride]);
    }
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(steps, 16)), static_cast<unsigned>(n));
    move_blocks<V><<<grid, kThreads, 0, stream>>>(static_cast<const V*>(src), static_cast<V*>(dst),
                                                  vecs, pairs);
    GPU_CHECK_LAUNCH("swap_blocks");
  }
}

}  // namespace

void swap_blocks(const SwapBlocksArgs& a, Stream stream) {
  const gpu::Stream s = gpu::stream_of(stream);
  int64_t largest = 0;
  for (int64_t i = 0; i < a.n; ++i) {
    largest = std::max(
        {largest, a.pairs[i * a.pair_stride], a.pairs[i * a.pair_stride + a.column_stride]});
  }
  void* src = reachable(a.src);
  void* dst = reachable(a.dst);
  if (src != nullptr && dst != nullptr && largest < (int64_t{1} << 32)) {
    if (gpu::aligned(16, src, dst, a.bytes)) return run<uint4>(a, src, dst, s);
    if (gpu::aligned(4, src, dst, a.bytes)) return run<uint32_t>(a, src, dst, s);
    return run<uint8_t>(a, src, dst, s);
  }
  for (int64_t i = 0; i < a.n; ++i) {
    const int64_t* pair = a.pairs + i * a.pair_stride;
    GPU_CHECK(GPU_NAME(MemcpyAsync)(static_cast<char*>(a.dst) + pair[a.column_stride] * a.bytes,
                                    static_cast<const char*>(a.src) + pair[0] * a.bytes,
                                    static_cast<size_t>(a.bytes), GPU_NAME(MemcpyDefault), s));
  }
}

void swap_blocks_batch(const SwapBatchArgs& a, Stream stream) {
  const gpu::Stream s = gpu::stream_of(stream);
#if CUDART_VERSION >= 13000
  GPU_NAME(StreamCaptureStatus) capturing = GPU_NAME(StreamCaptureStatusNone);
  // The legacy default stream takes no batches, and asking whether it captures is an error there.
  const bool named = s != nullptr && s != GPU_NAME(StreamLegacy);
  if (named) GPU_CHECK(GPU_NAME(StreamIsCapturing)(s, &capturing));
  if (named && capturing == GPU_NAME(StreamCaptureStatusNone)) {
    std::vector<const void*> src;
    std::vector<void*> dst;
    std::vector<size_t> sizes;
    for (int64_t i = 0; i < a.n; ++i) {  // empty copies are not accepted in a batch
      if (a.sizes[i] == 0) continue;
      src.push_back(reinterpret_cast<const void*>(a.src_ptrs[i]));
      dst.push_back(reinterpret_cast<void*>(a.dst_ptrs[i]));
      sizes.push_back(static_cast<size_t>(a.sizes[i]));
    }
    if (src.empty()) return;
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder =
        a.any_order ? cudaMemcpySrcAccessOrderAny : cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
    GPU_CHECK(cudaMemcpyBatchAsync(dst.data(), src.data(), sizes.data(), src.size(), &attributes,
                                   &first, 1, s));
    return;
  }
#endif
  for (int64_t i = 0; i < a.n; ++i) {
    if (a.sizes[i] == 0) continue;
    GPU_CHECK(GPU_NAME(MemcpyAsync)(reinterpret_cast<void*>(a.dst_ptrs[i]),
                                    reinterpret_cast<const void*>(a.src_ptrs[i]),
                                    static_cast<size_t>(a.sizes[i]), GPU_NAME(MemcpyDefault), s));
  }
}

}  // namespace kvcache
