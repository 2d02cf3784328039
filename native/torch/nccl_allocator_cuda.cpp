// Allocation hooks for torch's CUDAPluggableAllocator: memory from ncclMemAlloc, which NCCL can
// register as a window (bindings/pynccl_allocator.py). NCCL is not linked: the library that the
// process uses is named at run time, so that memory and communicators come from the same one.
#include <dlfcn.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <unordered_map>

#include "prim/gpu.h"

namespace {

// Parts of nccl.h: ncclResult_t is an int, 0 is success.
using MemAlloc = int (*)(void** pointer, std::size_t size);
using MemFree = int (*)(void* pointer);

std::atomic<MemAlloc> mem_alloc{nullptr};
std::atomic<MemFree> mem_free{nullptr};

// The order of allocations. Ranks that allocate alike have equal orders, while addresses differ.
std::mutex order_mutex;
std::unordered_map<void*, int64_t> order;
int64_t allocations = 0;

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Takes ncclMemAlloc and ncclMemFree from the library at `path`. Returns 0; 1 when it cannot be
// loaded, 2 when it is an NCCL (before 2.19) that lacks them.
EXPORTED int communicators_nccl_allocator_bind(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return 1;
  auto alloc = reinterpret_cast<MemAlloc>(dlsym(library, "ncclMemAlloc"));
  auto free = reinterpret_cast<MemFree>(dlsym(library, "ncclMemFree"));
  if (alloc == nullptr || free == nullptr) {
    dlclose(library);
    return 2;
  }
  mem_alloc.store(alloc);
  mem_free.store(free);
  return 0;  // the library stays loaded: memory from it may live as long as the process
}

// Null tells torch that there is no memory; it frees what it has cached, tries again, and raises
// its OutOfMemoryError.
EXPORTED void* communicators_nccl_alloc(std::size_t size, int device, gpu::Stream) noexcept {
  const MemAlloc alloc = mem_alloc.load();
  if (alloc == nullptr) return nullptr;
  try {
    gpu::DeviceGuard guard(device);
    void* pointer = nullptr;
    if (alloc(&pointer, size) != 0) return nullptr;
    std::lock_guard<std::mutex> lock(order_mutex);
    order[pointer] = ++allocations;
    return pointer;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "communicators: allocation for NCCL on device %d: %s\n", device,
                 error.what());
    return nullptr;
  }
}

EXPORTED void communicators_nccl_free(void* pointer, std::size_t size, int device,
                                      gpu::Stream) noexcept {
  const MemFree free = mem_free.load();
  if (pointer == nullptr || free == nullptr) return;
  try {
    {
      std::lock_guard<std::mutex> lock(order_mutex);
      order.erase(pointer);
    }
    gpu::DeviceGuard guard(device);
    const int result = free(pointer);
    if (result != 0) {
      std::fprintf(stderr, "communicators: ncclMemFree of %zu bytes on device %d failed: %d\n",
                   size, device, result);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "communicators: ncclMemFree on device %d: %s\n", device, error.what());
  }
}

// The how-manieth allocation of this process `pointer` was; 0 when it is none that lives.
EXPORTED int64_t communicators_nccl_allocation(void* pointer) {
  std::lock_guard<std::mutex> lock(order_mutex);
  const auto found = order.find(pointer);
  return found == order.end() ? 0 : found->second;
}
