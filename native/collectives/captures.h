// The calls of one communicator that GPU graphs have recorded, wherever they were captured: through
// Python, through a torch operator, or by a caller's own capture of the stream.
//
// A graph that recorded a call launches kernels on the communicator's memory as often as it is
// replayed, so that memory has to stay mapped as long as the graph, or one of its instances,
// exists. The graph says when that ends: it retains a user object, whose destructor runs with the
// last of them. A capture that is given up takes its graph along.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "prim/gpu.h"

namespace collectives {

class Captures {
 public:
  // By every call, with the stream that it goes to and what must be equal on all ranks. Returns
  // whether a graph is recording it.
  bool note(gpu::Stream stream, uint64_t op, uint64_t dtype, uint64_t bytes) {
    GPU_NAME(StreamCaptureStatus) status;
    GPU_CHECK(GPU_NAME(StreamIsCapturing)(stream, &status));
    if (status != GPU_NAME(StreamCaptureStatusActive)) return false;
    unsigned long long id = 0;
    GPU_NAME(Graph_t) graph = nullptr;
    GPU_CHECK(GPU_NAME_OF_CAPTURE_INFO(stream, &status, &id, &graph));
    if (id != last_) retain(graph);
    last_ = id;
    ++calls_;
    for (const uint64_t part : {op, dtype, bytes}) {
      digest_ = (digest_ ^ part) * 0x100000001b3u;  // FNV-1a over words
      digest_ ^= digest_ >> 29;
    }
    return true;
  }

  // How many calls were recorded since the last time, and a digest of what they were, in order.
  void take(uint64_t* calls, uint64_t* digest) {
    *calls = calls_;
    *digest = digest_;
    calls_ = digest_ = 0;
  }

  // Graphs that exist and have recorded a call. One may be counted twice when several are captured
  // at the same time.
  int graphs() const { return graphs_->load(); }

 private:
  using Count = std::shared_ptr<std::atomic<int>>;  // outlives the communicator, if a graph does

  void retain(GPU_NAME(Graph_t) graph) {
    auto count = std::make_unique<Count>(graphs_);
    GPU_NAME(UserObject_t) object = nullptr;
    GPU_CHECK(GPU_NAME(UserObjectCreate)(&object, count.get(), &Captures::gone, 1,
                                         GPU_NAME(UserObjectNoDestructorSync)));
    ++*graphs_;
    count.release();  // the object's from here on
    const gpu::Error error =
        GPU_NAME(GraphRetainUserObject)(graph, object, 1, GPU_NAME(GraphUserObjectMove));
    if (error == gpu::kSuccess) return;
    (void)GPU_NAME(UserObjectRelease)(object, 1);
    gpu::check(error, "GraphRetainUserObject", __FILE__, __LINE__);
  }

  // On a thread of the driver's, which may call nothing of it.
  static void gone(void* argument) {
    const std::unique_ptr<Count> count(static_cast<Count*>(argument));
    --**count;
  }

  Count graphs_ = std::make_shared<std::atomic<int>>(0);
  uint64_t last_ = 0;  // the capture whose graph has been seen to
  uint64_t calls_ = 0;
  uint64_t digest_ = 0;
};

}  // namespace collectives
