// Between floats and fp8 values on the CPU.
#include <algorithm>

#include "kvcache/cache.h"
#include "kvcache/runs_cpu.h"
#include "prim/cpu_parallel.h"

namespace kvcache {
namespace {

template <cpu::Stores kStores, class T>
void run_storing(const ConvertFp8Args& a) {
  constexpr int64_t kChunk = 4096;
  const int64_t chunks = (a.n + kChunk - 1) / kChunk;
  cpu::parallel_spans(chunks, kChunk * (sizeof(T) + 1), [&](int64_t chunk, int64_t end) {
    for (; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, n = std::min(kChunk, a.n - first);
      if (a.to_fp8) {
        store_run<kStores>(static_cast<uint8_t*>(a.out) + first,
                           static_cast<const T*>(a.in) + first, n, a.format, a.scale);
      } else {
        load_run<kStores>(static_cast<T*>(a.out) + first, static_cast<const uint8_t*>(a.in) + first,
                          n, a.format, a.scale);
      }
    }
    if constexpr (kStores == cpu::Stores::kStreamed) cpu::finish_streaming();
  });
}

}  // namespace

void convert_fp8(const ConvertFp8Args& a, Stream /*stream*/) {
  with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    const bool streams = cpu::beyond_caches(a.n * (sizeof(T) + 1)) && cpu::on_lines(a.out, {});
    return streams ? run_storing<cpu::Stores::kStreamed, T>(a)
                   : run_storing<cpu::Stores::kCached, T>(a);
  });
}

}  // namespace kvcache
