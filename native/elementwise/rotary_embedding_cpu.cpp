// Rotary position embedding on the CPU: a task is one token, its angles converted once.
#include <cstdint>

#include "elementwise/elementwise.h"
#include "elementwise/rotary.h"
#include "prim/cpu_parallel.h"

namespace elementwise {
namespace {

template <class T>
void load_angles(Rotation<T>& rotation, const RotaryArgs& a, int64_t position) {
  const int64_t at = position * a.cos_sin_stride;
  const float sign = a.inverse ? -1.0f : 1.0f;
  switch (a.cos_sin_dtype) {
    case DType::kFloat32:
      return rotation.load(static_cast<const float*>(a.cos_sin) + at, sign);
    case DType::kFloat16:
      return rotation.load(static_cast<const cpu::Half*>(a.cos_sin) + at, sign);
    default:
      return rotation.load(static_cast<const cpu::BFloat16*>(a.cos_sin) + at, sign);
  }
}

template <class T>
void run(const RotaryArgs& a) {
  const int64_t cost = 2 * sizeof(T) * a.rot * (a.query_heads + a.key_heads);
  cpu::parallel_spans(a.tokens, cost, [&](int64_t t, int64_t end) {
    Rotation<T> rotation(a.rot, a.neox);
    for (; t < end; ++t) {
      const int64_t position = a.positions[t];
      if (position < 0 || position >= a.max_position) continue;
      load_angles(rotation, a, position);
      rotation.turn(static_cast<T*>(a.query) + t * a.query_token_stride + a.offset, a.query_heads,
                    a.query_head_stride);
      if (a.key == nullptr) continue;
      rotation.turn(static_cast<T*>(a.key) + t * a.key_token_stride + a.offset, a.key_heads,
                    a.key_head_stride);
    }
  });
}

}  // namespace

void rotary_embedding(const RotaryArgs& a, Stream /*stream*/) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run<float>(a);
    case DType::kFloat16:
      return run<cpu::Half>(a);
    default:
      return run<cpu::BFloat16>(a);
  }
}

}  // namespace elementwise
