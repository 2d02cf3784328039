// One tensor from those of the ranks, in rank order.
#pragma once

#include <cstddef>

#include "shm/signature.h"

namespace shm {

// Bytes of one element, or 0 for a dtype that is not reduced so: bits are of integers and of bool,
// of which there is neither a sum nor an average.
size_t reduced_size(Reduction reduction, DType dtype);

// out[i] = sources[0][i] + ... + sources[count-1][i], or another reduction: fp16 and bf16 in fp32
// and rounded once, integers exactly (sums and products modulo 2^bits; an average is the sum
// divided, towards zero). A NaN is the least and the largest. The same value is written to `copy`
// unless it is null. `out` may be one of the sources; nothing else may overlap.
void reduce(Reduction reduction, DType dtype, void* out, void* copy, const void* const* sources,
            int count, size_t elements);

}  // namespace shm
