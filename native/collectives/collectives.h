// The collectives' host side: raw pointers in, kernels launched on the given stream. One algorithm
// a .cu file, each with its idea on top. `bytes` is what one rank contributes unless said
// otherwise; pointers need only be aligned to an element. Nothing here communicates on the host,
// and every rank must call the same function with the same sizes.
#pragma once

#include <cstdint>

#include "collectives/workspace.h"
#include "prim/dtype.h"
#include "prim/gpu.h"

namespace collectives {

// How many blocks work on a call. Zero: the algorithm's own choice.
struct Shape {
  int blocks = 0;        // all, or those that push
  int other_blocks = 0;  // those that reduce
  bool overlap = true;   // programmatic dependent launch
};

// Largest `bytes` of one call. More is cut into several calls by the caller.
uint64_t one_shot_limit(const Workspace& ws);
uint64_t two_shot_limit(const Workspace& ws);        // of the whole tensor
uint64_t reduce_scatter_limit(const Workspace& ws);  // of one rank's part
uint64_t all_gather_small_limit(const Workspace& ws);
uint64_t all_gather_limit(const Workspace& ws);

// Before the first call: waits on the device until all peers have prepared their workspaces.
void meet(const Workspace& ws, gpu::Stream stream);

void all_reduce_one_shot(const Workspace& ws, DType dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream);

// Two ranks, any size.
void all_reduce_streamed(const Workspace& ws, DType dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream);

void all_reduce_two_shot(const Workspace& ws, DType dtype, const void* inp, void* out,
                         uint64_t bytes, const Shape& shape, gpu::Stream stream);

// inp holds `world` parts, part r at r * stride bytes; out is `bytes` of the sum of part `rank`.
void reduce_scatter_push(const Workspace& ws, DType dtype, const void* inp, void* out,
                         uint64_t bytes, uint64_t stride, const Shape& shape, gpu::Stream stream);

// out has `world` parts, part r at r * stride bytes, of `bytes` each. Any bytes, copied exactly.
void all_gather_small(const Workspace& ws, const void* inp, void* out, uint64_t bytes,
                      uint64_t stride, const Shape& shape, gpu::Stream stream);
void all_gather_bulk(const Workspace& ws, const void* inp, void* out, uint64_t bytes,
                     uint64_t stride, const Shape& shape, gpu::Stream stream);

}  // namespace collectives
