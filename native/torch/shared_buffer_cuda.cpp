// Device buffers that peers map: allocation with a CUDA IPC handle, opening, freeing.
// allocate_shared_buffer_and_handle, open_mem_handle and free_shared_buffer have the arguments that
// vLLM's ops of these names have.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>

#include "prim/gpu.h"
#include "torch/dtypes.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch_glue::check;
using torch_glue::dtype_of;

constexpr int64_t kHandleBytes = sizeof(gpu::IpcMemHandle);
static_assert(kHandleBytes == 64, "CUDA and HIP define a memory handle as 64 bytes");

Tensor handle_tensor() {
  return torch::stable::empty({kHandleBytes}, ScalarType::Byte, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU, 0));
}

std::tuple<int64_t, Tensor> allocate_shared_buffer_and_handle(int64_t size) {
  check(size > 0, "allocate_shared_buffer_and_handle(size): size must be positive, got ", size);
  void* buffer = nullptr;
  GPU_CHECK(GPU_NAME(Malloc)(&buffer, static_cast<size_t>(size)));
  try {
    // Workspaces start as zeros: their epochs and flags are at rest there.
    GPU_CHECK(GPU_NAME(Memset)(buffer, 0, static_cast<size_t>(size)));
    GPU_CHECK(GPU_NAME(DeviceSynchronize)());
    Tensor handle = handle_tensor();
    GPU_CHECK(GPU_NAME(IpcGetMemHandle)(
        reinterpret_cast<gpu::IpcMemHandle*>(handle.mutable_data_ptr()), buffer));
    return {reinterpret_cast<int64_t>(buffer), handle};
  } catch (...) {
    (void)GPU_NAME(Free)(buffer);
    throw;
  }
}

int64_t open_mem_handle(Tensor handle) {
  check(handle.is_cpu() && dtype_of(handle) == ScalarType::Byte && handle.numel() == kHandleBytes &&
            handle.is_contiguous(),
        "open_mem_handle(handle): a contiguous uint8 CPU tensor of ", kHandleBytes,
        " bytes is expected");
  gpu::IpcMemHandle native;
  std::memcpy(&native, handle.const_data_ptr(), kHandleBytes);
  void* mapped = nullptr;
  GPU_CHECK(GPU_NAME(IpcOpenMemHandle)(&mapped, native, GPU_NAME(IpcMemLazyEnablePeerAccess)));
  return reinterpret_cast<int64_t>(mapped);
}

void close_mem_handle(int64_t pointer) {
  GPU_CHECK(GPU_NAME(IpcCloseMemHandle)(reinterpret_cast<void*>(pointer)));
}

void free_shared_buffer(int64_t pointer) {
  GPU_CHECK(GPU_NAME(Free)(reinterpret_cast<void*>(pointer)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(communicators, m) {
  m.def("allocate_shared_buffer_and_handle(int size) -> (int, Tensor)");
  m.def("open_mem_handle(Tensor handle) -> int");
  m.def("close_mem_handle(int pointer) -> ()");
  m.def("free_shared_buffer(int pointer) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(communicators, CompositeExplicitAutograd, m) {
  m.impl("allocate_shared_buffer_and_handle",
         torch_glue::boxed<&allocate_shared_buffer_and_handle>);
  m.impl("open_mem_handle", torch_glue::boxed<&open_mem_handle>);
  m.impl("close_mem_handle", torch_glue::boxed<&close_mem_handle>);
  m.impl("free_shared_buffer", torch_glue::boxed<&free_shared_buffer>);
}
