// The functions of the GPU's runtime that the host side of the collectives calls, for the emulated
// GPU: device memory is host memory, and graphs are lists of launches.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

namespace emulated {

struct UserObject {
  void* argument;
  void (*destroy)(void*);
  int references;
};
inline void release(UserObject* object) {
  if (--object->references > 0) return;
  object->destroy(object->argument);
  delete object;
}

struct Graph {
  std::vector<std::function<void()>> launches;
  std::vector<UserObject*> retained;
};
struct Stream {
  Graph* graph = nullptr;  // that is being captured
  uint64_t capture = 0;
};

// The graph that a stream is captured into, if it is; the null stream never is.
inline Graph* graph_of(void* stream) {
  return stream == nullptr ? nullptr : static_cast<Stream*>(stream)->graph;
}

int synchronize();

}  // namespace emulated

using emulated_Error_t = int;
using emulated_Stream_t = void*;
using emulated_Graph_t = emulated::Graph*;
using emulated_UserObject_t = emulated::UserObject*;
using emulated_StreamCaptureStatus = int;
inline constexpr int emulated_StreamCaptureStatusActive = 1;
inline constexpr int emulated_UserObjectNoDestructorSync = 1;
inline constexpr int emulated_GraphUserObjectMove = 1;
inline constexpr int emulated_MemcpyHostToDevice = 1;
inline constexpr int emulated_HostAllocMapped = 2, cudaHostAllocMapped = 2;

inline int emulated_StreamIsCapturing(void* stream, int* status) {
  *status = emulated::graph_of(stream) != nullptr;
  return 0;
}
inline int emulated_StreamGetCaptureInfo(void* stream, int* status, unsigned long long* id,
                                         emulated::Graph** graph) {
  *status = 1;
  *id = static_cast<emulated::Stream*>(stream)->capture;
  *graph = emulated::graph_of(stream);
  return 0;
}
inline int emulated_UserObjectCreate(emulated::UserObject** made, void* argument,
                                     void (*destroy)(void*), int references, int) {
  *made = new emulated::UserObject{argument, destroy, references};
  return 0;
}
inline int emulated_UserObjectRelease(emulated::UserObject* object, int) {
  emulated::release(object);
  return 0;
}
inline int emulated_GraphRetainUserObject(emulated::Graph* graph, emulated::UserObject* object, int,
                                          int) {
  graph->retained.push_back(object);
  return 0;
}
inline int emulated_GetDevice(int* device) { return *device = 0; }
inline int emulated_HostAlloc(void** made, size_t bytes, int) {
  *made = std::malloc(bytes);
  return 0;
}
inline int emulated_FreeHost(void* memory) {
  std::free(memory);
  return 0;
}
inline int emulated_HostGetDevicePointer(void** device, void* host, int) {
  *device = host;
  return 0;
}
inline int emulated_Memset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return 0;
}
inline int emulated_Memset2D(void* to, size_t pitch, int value, size_t width, size_t height) {
  for (size_t row = 0; row < height; ++row) {
    std::memset(static_cast<char*>(to) + row * pitch, value, width);
  }
  return 0;
}
inline int emulated_Memcpy(void* to, const void* from, size_t bytes, int) {
  std::memcpy(to, from, bytes);
  return 0;
}
inline int emulated_DeviceSynchronize() { return emulated::synchronize(); }
