// How long a GPU waits for a load from memory that may be a peer's.
#pragma once

#include <cstdint>

namespace collectives {

// Mean time of one load, microseconds: `hops` dependent loads by one thread of the current device,
// each from the place that the one before named. The first `bytes` at `memory` are overwritten.
float load_latency_us(uint32_t* memory, int64_t bytes, int hops);

}  // namespace collectives
