// The sum of the ranks' contributions, in rank order, rounded once.
#pragma once

#include <cstddef>

#include "shm/signature.h"

namespace shm {

// Bytes of one element, or 0 for a dtype that is not summed.
size_t sum_element_size(DType dtype);

// out[i] = sources[0][i] + ... + sources[count-1][i]: fp32, fp16 and bf16 in fp32, fp64 in fp64,
// integers exactly (modulo 2^bits). The same value is written to `copy` unless it is null. `out`
// may be one of the sources; nothing else may overlap.
void sum(DType dtype, void* out, void* copy, const void* const* sources, int count,
         size_t elements);

}  // namespace shm
