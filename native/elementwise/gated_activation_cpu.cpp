// Gated activations on the CPU.
#include <algorithm>
#include <cstdint>

#include "elementwise/elementwise.h"
#include "prim/cpu_dispatch.h"
#include "prim/cpu_floats.h"
#include "prim/cpu_math.h"
#include "prim/cpu_parallel.h"

namespace elementwise {
namespace {

using cpu::from_float;
using cpu::to_float;

template <Activation kAct>
ALWAYS_INLINE float activate(float x) {
  if constexpr (kAct == Activation::kGelu) return cpu::gelu(x);
  if constexpr (kAct == Activation::kGeluTanh) return cpu::gelu_tanh(x);
  return cpu::silu(x);
}

// n outputs of one row. x and y point at the first element of each half (of the pairs: at g and u).
template <Activation kAct, class T>
VECTORISED void activate_run(T* __restrict out, const T* __restrict x, const T* __restrict y,
                             int64_t n, float alpha, float limit) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kAct == Activation::kSwigluOai) {
      float g = to_float(x[2 * i]), u = to_float(y[2 * i]);
      g = g > limit ? limit : g;
      u = u > limit ? limit : u;
      u = u < -limit ? -limit : u;
      out[i] = from_float<T>((u + 1.0f) * g * cpu::sigmoid(alpha * g));
    } else if constexpr (kAct == Activation::kFatRelu) {
      const float gate = to_float(x[i]);
      out[i] = from_float<T>((gate > alpha ? gate : 0.0f) * to_float(y[i]));
    } else if constexpr (kAct == Activation::kMulSilu) {
      const T act = from_float<T>(activate<kAct>(to_float(y[i])));
      out[i] = from_float<T>(to_float(x[i]) * to_float(act));
    } else {
      const T act = from_float<T>(activate<kAct>(to_float(x[i])));
      out[i] = from_float<T>(to_float(act) * to_float(y[i]));
    }
  }
}

template <Activation kAct, class T>
void run(const ActivationArgs& a) {
  // Cut rows too, so that one long row still uses every thread.
  constexpr int64_t kChunk = 2048;
  const int64_t chunks = (a.d + kChunk - 1) / kChunk;
  cpu::parallel_for(a.rows * chunks, 3 * sizeof(T) * std::min(a.d, kChunk), [&](int64_t task) {
    const int64_t row = task / chunks, first = task % chunks * kChunk;
    const int64_t n = std::min(kChunk, a.d - first);
    const T* in = static_cast<const T*>(a.input) + row * 2 * a.d;
    T* out = static_cast<T*>(a.out) + row * a.d + first;
    if constexpr (kAct == Activation::kSwigluOai) {
      activate_run<kAct>(out, in + 2 * first, in + 2 * first + 1, n, a.alpha, a.limit);
    } else {
      activate_run<kAct>(out, in + first, in + a.d + first, n, a.alpha, a.limit);
    }
  });
}

template <Activation kAct>
void by_dtype(const ActivationArgs& a) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run<kAct, float>(a);
    case DType::kFloat16:
      return run<kAct, cpu::Half>(a);
    default:
      return run<kAct, cpu::BFloat16>(a);
  }
}

}  // namespace

void gated_activation(const ActivationArgs& a, Stream /*stream*/) {
  switch (a.activation) {
    case Activation::kSilu:
      return by_dtype<Activation::kSilu>(a);
    case Activation::kMulSilu:
      return by_dtype<Activation::kMulSilu>(a);
    case Activation::kGelu:
      return by_dtype<Activation::kGelu>(a);
    case Activation::kGeluTanh:
      return by_dtype<Activation::kGeluTanh>(a);
    case Activation::kFatRelu:
      return by_dtype<Activation::kFatRelu>(a);
    case Activation::kSwigluOai:
      return by_dtype<Activation::kSwigluOai>(a);
  }
}

}  // namespace elementwise
