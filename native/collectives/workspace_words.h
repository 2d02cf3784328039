// The words that every block of a kernel reads first, in the memory of exact and quantized
// collectives alike.
#pragma once

#include <cstdint>

namespace collectives {

// Every word of a workspace at rest holds the same value, so a block may read any of them; many, so
// that not all blocks go to one place in the L2. Both halves are read in one load.
struct alignas(16) StateWord {
  uint64_t state;
  uint64_t aborted;
};

}  // namespace collectives
