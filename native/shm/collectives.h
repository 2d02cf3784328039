// The collectives over shared memory, on raw pointers. Every rank makes the same calls in the same
// order; each is one Call of the Team. All throw shm::Error (team.h).
#pragma once

#include <cstddef>

#include "shm/signature.h"
#include "shm/team.h"

namespace shm {

// out = sum over the ranks of inp, both `elements` long, or another reduction; out may be inp.
// Reduced in rank order (reduce.h), sums in fp32 for fp32, fp16 and bf16, and rounded once: the
// same bits on all ranks, whatever the algorithm. `dtype` is one that reduced_size() knows.
void all_reduce(Team& team, DType dtype, const void* inp, void* out, size_t elements,
                Reduction reduction = Reduction::kSum);

// The same on rank `root` alone; `out` is not looked at elsewhere.
void reduce(Team& team, DType dtype, const void* inp, void* out, size_t elements, int root,
            Reduction reduction = Reduction::kSum);

// inp [outer][W][inner] -> out [outer][inner], rank r's being the sum of the parts [:][r][:].
// `elements` is outer * inner. Reduced as by all_reduce.
void reduce_scatter(Team& team, DType dtype, const void* inp, void* out, size_t elements,
                    size_t inner, Reduction reduction = Reduction::kSum);

// inp [outer][inner] -> out [outer][W][inner]. Sizes in bytes; `bytes` is outer * inner_bytes.
void all_gather(Team& team, DType dtype, const void* inp, void* out, size_t bytes,
                size_t inner_bytes);

// The same on rank `root` alone; `out` is not looked at elsewhere.
void gather(Team& team, DType dtype, const void* inp, void* out, size_t bytes, size_t inner_bytes,
            int root);

// Part r, of `bytes`, of rank `root`'s inp in rank r's out; `inp` is not looked at elsewhere.
void scatter(Team& team, DType dtype, const void* inp, void* out, size_t bytes, int root);

// Part q of inp, to[q] bytes long, goes to rank q; part p of out, from[p] bytes long, comes from
// rank p. The parts lie side by side. What the ranks say of each other must match.
void all_to_all(Team& team, DType dtype, const void* inp, const uint64_t* to, void* out,
                const uint64_t* from);

// The bytes of rank `root`, on all ranks.
void broadcast(Team& team, DType dtype, void* data, size_t bytes, int root);

// Returns once all ranks have called it.
void barrier(Team& team);

}  // namespace shm
