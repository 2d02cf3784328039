// Between floats and 8-bit codes on the CPU.
#include <algorithm>

#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {

void convert_fp8(const ConvertFp8Args& a, Stream /*stream*/) {
  constexpr int64_t kChunk = 4096;
  const int64_t chunks = (a.n + kChunk - 1) / kChunk;
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    cpu::parallel_for(chunks, kChunk * (sizeof(T) + 1), [&](int64_t chunk) {
      const int64_t first = chunk * kChunk, n = std::min(kChunk, a.n - first);
      if (a.to_fp8) {
        store_run(static_cast<uint8_t*>(a.out) + first, static_cast<const T*>(a.in) + first, n,
                  a.format, a.scale);
      } else {
        load_run(static_cast<T*>(a.out) + first, static_cast<const uint8_t*>(a.in) + first, n,
                 a.format, a.scale);
      }
    });
  });
}

}  // namespace kvcache
