// Parallel loops over torch's own thread pool, without torch's headers.
#pragma once

#include <cstdint>

namespace cpu {

// Defined beside torch. body(context, begin, end) runs on ranges of at least `grain` iterations.
void parallel_ranges(int64_t begin, int64_t end, int64_t grain,
                     void (*body)(void* context, int64_t begin, int64_t end), void* context);

// f(begin, end) on spans that make up [0, n), `cost` being the rough number of bytes an iteration
// touches: a span is worth a thread from about 64 KB. An iteration's result must not depend on the
// span it is in.
template <class F>
void parallel_spans(int64_t n, int64_t cost, const F& f) {
  constexpr int64_t kBytes = 64 << 10;
  const int64_t grain = cost >= kBytes ? 1 : kBytes / (cost > 0 ? cost : 1);
  parallel_ranges(
      0, n, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<F*>(&f));
}

// f(i) for each i in [0, n).
template <class F>
void parallel_for(int64_t n, int64_t cost, const F& f) {
  parallel_spans(n, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace cpu
