// Launches with programmatic dependent launch where the GPU has it; recorded in CUDA graphs as
// well. They go to the driver directly: the runtime's own launch looks the kernel up every time,
// which costs 0.7 us of a small collective.
#pragma once

#include <atomic>
#include <type_traits>

#include "prim/gpu.h"

#if !COMMUNICATORS_HIP
#include <cuda.h>
#endif

namespace gpu {

struct LaunchConfig {
  int blocks;
  int threads;
  Stream stream;
  bool overlap;  // programmatic dependent launch: the kernel must call dependency_wait()
};

#if COMMUNICATORS_HIP

template <auto kernel, typename... Parameters>
void launch_typed(const LaunchConfig& config, const char* name, void (*)(Parameters...),
                  Parameters... arguments) {
  kernel<<<dim3(static_cast<unsigned>(config.blocks)), dim3(static_cast<unsigned>(config.threads)),
           0, config.stream>>>(arguments...);
  check(hipGetLastError(), name, __FILE__, __LINE__);
}

// Whether a device has programmatic dependent launch (`overlap`): no AMD GPU has.
inline bool has_dependent_launch(int) { return false; }

inline int multiprocessors(int device) {
  int count = 0;
  GPU_CHECK(hipDeviceGetAttribute(&count, hipDeviceAttributeMultiprocessorCount, device));
  return count;
}

#else

// Whether a device has programmatic dependent launch (`overlap`).
inline bool has_dependent_launch(int device) {
  int major = 0;
  GPU_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

inline int multiprocessors(int device) {
  int count = 0;
  GPU_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// The most shared memory that a block can have.
inline int most_shared_bytes(int device) {
  int bytes = 0;
  GPU_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// A fact about the current device, asked for once. It is kept as 1 more, 0 being "not yet asked".
template <auto ask>
int on_current_device() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  int device = 0;
  GPU_CHECK(cudaGetDevice(&device));
  if (device >= kMaxDevices) return ask(device);
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    value = static_cast<int>(ask(device)) + 1;
    known[device].store(value, std::memory_order_relaxed);
  }
  return value - 1;
}

using DriverLaunch = CUresult (*)(const CUlaunchConfig*, CUfunction, void**, void**);

// cuLaunchKernelEx of the driver that the runtime uses; libcuda itself is not linked.
inline DriverLaunch driver_launch() {
  static const DriverLaunch found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
    GPU_CHECK(cudaGetDriverEntryPointByVersion("cuLaunchKernelEx", &entry, 12000, cudaEnableDefault,
                                               &result));
    return reinterpret_cast<DriverLaunch>(entry);
  }();
  return found;
}

// The driver's handle of a kernel on the current device, found once.
template <auto kernel>
CUfunction driver_function() {
  constexpr int kMaxDevices = 64;
  static std::atomic<CUfunction> found[kMaxDevices];
  int device = 0;
  GPU_CHECK(cudaGetDevice(&device));
  if (device >= kMaxDevices) return nullptr;
  CUfunction function = found[device].load(std::memory_order_relaxed);
  if (function == nullptr) {
    GPU_CHECK(cudaGetFuncBySymbol(&function, reinterpret_cast<const void*>(kernel)));
    found[device].store(function, std::memory_order_relaxed);
  }
  return function;
}

template <typename... Parameters>
void launch_by_runtime(const LaunchConfig& config, const char* name, void (*kernel)(Parameters...),
                       Parameters... arguments) {
  cudaLaunchConfig_t native = {};
  native.gridDim = dim3(static_cast<unsigned>(config.blocks));
  native.blockDim = dim3(static_cast<unsigned>(config.threads));
  native.stream = config.stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  native.attrs = &attribute;
  native.numAttrs = config.overlap ? 1 : 0;
  check(cudaLaunchKernelEx(&native, kernel, arguments...), name, __FILE__, __LINE__);
}

template <auto kernel, typename... Parameters>
void launch_typed(const LaunchConfig& config, const char* name, void (*)(Parameters...),
                  Parameters... arguments) {
  const CUfunction function = driver_function<kernel>();
  CUlaunchConfig native = {};
  native.gridDimX = static_cast<unsigned>(config.blocks);
  native.gridDimY = native.gridDimZ = 1;
  native.blockDimX = static_cast<unsigned>(config.threads);
  native.blockDimY = native.blockDimZ = 1;
  native.hStream = config.stream;
  CUlaunchAttribute attribute;
  attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute.value.programmaticStreamSerializationAllowed = 1;
  native.attrs = &attribute;
  native.numAttrs = config.overlap ? 1 : 0;
  void* pointers[] = {&arguments...};
  if (function != nullptr && driver_launch()(&native, function, pointers, nullptr) == 0) return;
  // The runtime says in words what is wrong.
  launch_by_runtime(config, name, kernel, arguments...);
}

#endif  // COMMUNICATORS_HIP

// What a launch of any shape may ask for beside it. cluster: blocks of grid.x that run together and
// reach each other's shared memory (0: none); for GPUs that have_clusters().
struct LaunchExtras {
  int shared_bytes = 0;
  int cluster = 0;
};

inline bool have_clusters() {
#if COMMUNICATORS_HIP
  return false;
#else
  return on_current_device<has_dependent_launch>();  // they came together, with sm_90
#endif
}

// Grids of fewer blocks start after their predecessor: behind a kernel that does not let them in
// early they would lose 0.2 us (H200, in torch's CUDA graphs).
inline constexpr int64_t kSmallGrid = 64;

// A launch of any shape, for a kernel whose first line is begin_overlapped() (which one that is
// only launched in small grids can do without): where the GPU can, it starts while its predecessor
// in the stream ends.
template <typename... Parameters>
void launch_overlapped_with(const LaunchExtras& extras, const char* name,
                            void (*kernel)(Parameters...), dim3 grid, int threads, Stream stream,
                            std::type_identity_t<Parameters>... arguments) {
#if COMMUNICATORS_HIP
  kernel<<<grid, dim3(static_cast<unsigned>(threads)), static_cast<size_t>(extras.shared_bytes),
           stream>>>(arguments...);
  check(hipGetLastError(), name, __FILE__, __LINE__);
#else
  cudaLaunchConfig_t native = {};
  native.gridDim = grid;
  native.blockDim = dim3(static_cast<unsigned>(threads));
  native.dynamicSmemBytes = static_cast<size_t>(extras.shared_bytes);
  native.stream = stream;
  cudaLaunchAttribute attributes[2];
  native.attrs = attributes;
  const bool large = int64_t{grid.x} * grid.y * grid.z >= kSmallGrid;
  if (large && on_current_device<has_dependent_launch>()) {
    cudaLaunchAttribute& overlap = attributes[native.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (extras.cluster > 0) {
    cudaLaunchAttribute& cluster = attributes[native.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(extras.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  check(cudaLaunchKernelEx(&native, kernel, arguments...), name, __FILE__, __LINE__);
#endif
}

template <typename... Parameters>
void launch_overlapped(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads,
                       Stream stream, std::type_identity_t<Parameters>... arguments) {
  launch_overlapped_with({}, name, kernel, grid, threads, stream, arguments...);
}

template <auto kernel, typename... Arguments>
void launch(const LaunchConfig& config, const char* name, Arguments... arguments) {
  launch_typed<kernel>(config, name, kernel, arguments...);
}

}  // namespace gpu
