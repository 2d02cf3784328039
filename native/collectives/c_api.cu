// The C interface, called through ctypes (communicators/bindings/collectives.py), and the exact
// all-reduce by native/python/all_reduce_call.cpp too: a call from Python costs microseconds less
// than a torch operator, as much as a small all-reduce takes.
//
// Functions return 0, or 1 with communicators_gpu_error() the sentence, for the calling thread;
// prim/error.h says how it begins.
#include <exception>
#include <string>

#include "collectives/custom_all_reduce.h"
#include "collectives/quick_all_reduce.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

using collectives::CustomAllReduce;
using collectives::find;
using collectives::find_as;
using quick::QuickAllReduce;

thread_local std::string last_error;

template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const prim::Error& error) {
    last_error = error.what();
  } catch (const std::exception& error) {
    last_error = prim::text(prim::kFailed, ": ", error.what());
  }
  return 1;
}

// Launches go to the device of the communicator, whatever device is current.
template <class Kind, typename Body>
int on_device(int64_t handle, Body body) {
  return guarded([&] {
    const auto communicator = find_as<Kind>(handle);
    const gpu::DeviceGuard guard(communicator->device());
    body(*communicator);
  });
}

std::vector<char*> addresses(const uint64_t* bases, int world) {
  std::vector<char*> found;
  for (int r = 0; r < world; ++r) found.push_back(reinterpret_cast<char*>(bases[r]));
  return found;
}

}  // namespace

EXPORTED const char* communicators_gpu_error() { return last_error.c_str(); }

// --- what both kinds of handles have -------------------------------------------------------------

EXPORTED int communicators_gpu_check(int64_t handle) {
  return guarded([&] { find(handle)->check(); });
}

EXPORTED int communicators_gpu_destroy(int64_t handle) {
  return guarded([&] { collectives::remove(handle); });
}

// For a communicator whose recorded calls may still be replayed: nothing is freed, and every later
// kernel on its memory ends as soon as it starts. communicators_gpu_destroy() may follow once there
// are no graphs any more.
EXPORTED int communicators_gpu_retire(int64_t handle) {
  return guarded([&] {
    const auto communicator = find(handle);
    const gpu::DeviceGuard guard(communicator->device());
    communicator->retire();
  });
}

// How many calls graphs have recorded since the last time this was asked, and a digest of them.
EXPORTED int communicators_gpu_captured(int64_t handle, uint64_t* calls, uint64_t* digest) {
  return guarded([&] { find(handle)->captures().take(calls, digest); });
}

// Graphs that exist and have recorded calls. While there are any, only retire() may end a handle.
EXPORTED int communicators_gpu_graphs(int64_t handle, int* graphs) {
  return guarded([&] { *graphs = find(handle)->captures().graphs(); });
}

EXPORTED int communicators_gpu_set_timeout_ns(int64_t handle, uint64_t timeout_ns) {
  return guarded([&] { find(handle)->set_timeout_ns(timeout_ns); });
}

// --- exact ---------------------------------------------------------------------------------------

EXPORTED uint64_t communicators_custom_ar_bytes(uint64_t slot, uint64_t ll, uint64_t bulk) {
  return collectives::Layout{slot, ll, bulk}.total();
}

EXPORTED int communicators_custom_ar_create(int64_t* handle, const uint64_t* bases, int world,
                                            int rank, uint64_t slot, uint64_t ll, uint64_t bulk) {
  return guarded([&] {
    const collectives::Layout layout{slot, ll, bulk};
    *handle =
        collectives::add(std::make_shared<CustomAllReduce>(addresses(bases, world), rank, layout));
  });
}

EXPORTED int communicators_custom_ar_all_reduce(int64_t handle, int dtype, const void* inp,
                                                void* out, uint64_t bytes, void* stream) {
  return on_device<CustomAllReduce>(handle, [&](auto& communicator) {
    communicator.all_reduce(static_cast<DType>(dtype), inp, out, bytes,
                            static_cast<gpu::Stream>(stream));
  });
}

EXPORTED int communicators_custom_ar_all_gather(int64_t handle, const void* inp, void* out,
                                                uint64_t bytes, void* stream) {
  return on_device<CustomAllReduce>(handle, [&](auto& communicator) {
    communicator.all_gather(inp, out, bytes, static_cast<gpu::Stream>(stream));
  });
}

EXPORTED int communicators_custom_ar_reduce_scatter(int64_t handle, int dtype, const void* inp,
                                                    void* out, uint64_t bytes, void* stream) {
  return on_device<CustomAllReduce>(handle, [&](auto& communicator) {
    communicator.reduce_scatter(static_cast<DType>(dtype), inp, out, bytes,
                                static_cast<gpu::Stream>(stream));
  });
}

EXPORTED int communicators_custom_ar_tune(int64_t handle, const char* name, int64_t value) {
  return guarded([&] { find_as<CustomAllReduce>(handle)->tune(name, value); });
}

EXPORTED int communicators_custom_ar_algorithm(int64_t handle, uint64_t bytes, int* algorithm) {
  return guarded([&] {
    *algorithm = static_cast<int>(find_as<CustomAllReduce>(handle)->algorithm_for(bytes));
  });
}

// --- quantized -----------------------------------------------------------------------------------

EXPORTED uint64_t communicators_quick_ar_bytes(uint64_t area) {
  return QuickAllReduce::buffer_bytes(area);
}

EXPORTED int communicators_quick_ar_create(int64_t* handle, const uint64_t* bases, int world,
                                           int rank, uint64_t area) {
  return guarded([&] {
    *handle =
        collectives::add(std::make_shared<QuickAllReduce>(addresses(bases, world), rank, area));
  });
}

EXPORTED int communicators_quick_ar_all_reduce(int64_t handle, int codec, int dtype,
                                               const void* inp, void* out, uint64_t bytes,
                                               void* stream) {
  return on_device<QuickAllReduce>(handle, [&](auto& communicator) {
    communicator.run(static_cast<quick::Codec>(codec), static_cast<DType>(dtype), inp, out, bytes,
                     static_cast<gpu::Stream>(stream));
  });
}

// Zeros: the defaults. All ranks of one GPU must fit on it together.
EXPORTED int communicators_quick_ar_set_launch(int64_t handle, int blocks, int threads, int ahead,
                                               int overlap) {
  return guarded([&] {
    const auto communicator = find_as<QuickAllReduce>(handle);
    communicator->set_shape(blocks, threads, ahead);
    communicator->set_overlap(overlap != 0);
  });
}
