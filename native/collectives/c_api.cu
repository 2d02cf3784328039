// The C interface, called through ctypes, and all_reduce by native/python/all_reduce_call.cpp too:
// a call from Python costs microseconds less than a torch operator, as much as a small all-reduce
// takes. Functions return 0 or a collectives::Failure; communicators_ar_error() is then the
// sentence, for the calling thread.
#include <exception>
#include <string>

#include "collectives/communicator.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string last_error;

template <typename Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const collectives::Error& error) {
    last_error = error.what();
    return static_cast<int>(error.failure);
  } catch (const std::exception& error) {
    last_error = error.what();
    return static_cast<int>(collectives::Failure::kPlatform);
  }
}

collectives::Communicator& of(void* handle) {
  return *static_cast<collectives::Communicator*>(handle);
}

// Launches go to the device of the communicator, whatever device is current.
template <typename Body>
int on_device(void* handle, Body body) {
  return guarded([&] {
    const gpu::DeviceGuard guard(of(handle).device());
    body(of(handle));
  });
}

}  // namespace

EXPORTED const char* communicators_ar_error() { return last_error.c_str(); }

EXPORTED uint64_t communicators_ar_bytes(uint64_t slot, uint64_t tagged, uint64_t bulk) {
  return collectives::Layout{slot, tagged, bulk}.total();
}

EXPORTED int communicators_ar_create(void** handle, const uint64_t* bases, int world, int rank,
                                     uint64_t slot, uint64_t tagged, uint64_t bulk) {
  return guarded([&] {
    std::vector<char*> addresses;
    for (int r = 0; r < world; ++r) addresses.push_back(reinterpret_cast<char*>(bases[r]));
    *handle =
        new collectives::Communicator(addresses, rank, collectives::Layout{slot, tagged, bulk});
  });
}

EXPORTED void communicators_ar_destroy(void* handle) { delete &of(handle); }

// For a communicator whose recorded calls may still be replayed: nothing is freed, and every later
// kernel on the workspace ends as soon as it starts. communicators_ar_destroy() may follow once
// there are no graphs any more.
EXPORTED int communicators_ar_retire(void* handle) {
  return on_device(handle, [](auto& communicator) { communicator.retire(); });
}

// How many calls graphs have recorded since the last time this was asked, and a digest of them.
EXPORTED void communicators_ar_captured(void* handle, uint64_t* calls, uint64_t* digest) {
  of(handle).captures().take(calls, digest);
}

// Graphs that exist and have recorded calls. While there are any, only retire() may end a handle.
EXPORTED int communicators_ar_graphs(void* handle) { return of(handle).captures().graphs(); }

EXPORTED int communicators_ar_all_reduce(void* handle, int dtype, const void* inp, void* out,
                                         uint64_t bytes, void* stream) {
  return on_device(handle, [&](auto& communicator) {
    communicator.all_reduce(static_cast<DType>(dtype), inp, out, bytes,
                            static_cast<gpu::Stream>(stream));
  });
}

EXPORTED int communicators_ar_all_gather(void* handle, const void* inp, void* out, uint64_t bytes,
                                         void* stream) {
  return on_device(handle, [&](auto& communicator) {
    communicator.all_gather(inp, out, bytes, static_cast<gpu::Stream>(stream));
  });
}

EXPORTED int communicators_ar_reduce_scatter(void* handle, int dtype, const void* inp, void* out,
                                             uint64_t bytes, void* stream) {
  return on_device(handle, [&](auto& communicator) {
    communicator.reduce_scatter(static_cast<DType>(dtype), inp, out, bytes,
                                static_cast<gpu::Stream>(stream));
  });
}

EXPORTED int communicators_ar_check(void* handle) {
  return guarded([&] { of(handle).check(); });
}

EXPORTED void communicators_ar_set_timeout_ns(void* handle, uint64_t timeout_ns) {
  of(handle).set_timeout_ns(timeout_ns);
}

EXPORTED int communicators_ar_tune(void* handle, const char* name, int64_t value) {
  return guarded([&] { of(handle).tune(name, value); });
}

EXPORTED int communicators_ar_algorithm(void* handle, uint64_t bytes) {
  return static_cast<int>(of(handle).algorithm_for(bytes));
}
