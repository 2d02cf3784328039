// Rotary position embedding on the CPU: a task is one token, its angles converted once.
#include <cstdint>
#include <vector>

#include "elementwise/elementwise.h"
#include "elementwise/rotary.h"
#include "prim/cpu_parallel.h"

namespace elementwise {
namespace {

void load_angles(const RotaryArgs& a, int64_t position, float* out) {
  const int64_t half = a.rot / 2, at = position * a.cos_sin_stride;
  const float sign = a.inverse ? -1.0f : 1.0f;
  switch (a.cos_sin_dtype) {
    case DType::kFloat32:
      return load_angles(out, static_cast<const float*>(a.cos_sin) + at, half, sign);
    case DType::kFloat16:
      return load_angles(out, static_cast<const cpu::Half*>(a.cos_sin) + at, half, sign);
    default:
      return load_angles(out, static_cast<const cpu::BFloat16*>(a.cos_sin) + at, half, sign);
  }
}

template <class T>
void run(const RotaryArgs& a) {
  const int64_t half = a.rot / 2;
  const int64_t cost = 2 * sizeof(T) * a.rot * (a.query_heads + a.key_heads);
  cpu::parallel_for(a.tokens, cost, [&](int64_t t) {
    const int64_t position = a.positions[t];
    if (position < 0 || position >= a.max_position) return;
    thread_local std::vector<float> angles;
    angles.resize(a.rot);
    load_angles(a, position, angles.data());
    const float *cos = angles.data(), *sin = cos + half;
    T* query = static_cast<T*>(a.query) + t * a.query_token_stride + a.offset;
    for (int64_t h = 0; h < a.query_heads; ++h) {
      rotate(query + h * a.query_head_stride, cos, sin, half, a.neox);
    }
    if (a.key == nullptr) return;
    T* key = static_cast<T*>(a.key) + t * a.key_token_stride + a.offset;
    for (int64_t h = 0; h < a.key_heads; ++h) {
      rotate(key + h * a.key_head_stride, cos, sin, half, a.neox);
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
