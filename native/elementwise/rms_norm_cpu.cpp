// RMSNorm on the CPU: a row is summed in 32 fixed lanes, whatever the batch or the thread.
#include <cmath>
#include <cstdint>

#include "elementwise/elementwise.h"
#include "prim/cpu_dispatch.h"
#include "prim/cpu_floats.h"
#include "prim/cpu_parallel.h"

namespace elementwise {
namespace {

using cpu::from_float;
using cpu::to_float;

constexpr int64_t kLanes = 32;

ALWAYS_INLINE float fold(float (&lane)[kLanes]) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

template <class T>
ALWAYS_INLINE void scale_row(T* __restrict out, const T* __restrict x, const T* __restrict weight,
                             int64_t n, float factor) {
  if (weight != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = from_float<T>(to_float(x[i]) * factor * to_float(weight[i]));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(to_float(x[i]) * factor);
  }
}

template <class T>
ALWAYS_INLINE float inverse_rms(const T* x, int64_t n, float epsilon) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += to_float(x[i + j]) * to_float(x[i + j]);
  }
  for (int64_t j = 0; i + j < n; ++j) lane[j] += to_float(x[i + j]) * to_float(x[i + j]);
  return 1.0f / std::sqrt(fold(lane) / static_cast<float>(n) + epsilon);
}

template <class T>
VECTORISED void norm_row(T* __restrict out, const T* __restrict x, const T* __restrict weight,
                         int64_t n, float epsilon) {
  scale_row(out, x, weight, n, inverse_rms(x, n, epsilon));
}

template <class T>
VECTORISED void add_norm_row(T* __restrict x, T* __restrict residual, const T* __restrict weight,
                             int64_t n, float epsilon) {
  for (int64_t i = 0; i < n; ++i) {
    residual[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
  }
  scale_row(x, residual, weight, n, inverse_rms(residual, n, epsilon));
}

template <class T>
void run(const RmsNormArgs& a) {
  cpu::parallel_for(a.n0 * a.n1 * a.n2, 2 * sizeof(T) * a.hidden, [&](int64_t row) {
    const int64_t k = row % a.n2, j = row / a.n2 % a.n1, i = row / a.n2 / a.n1;
    const T* weight = static_cast<const T*>(a.weight);
    if (weight != nullptr) weight += i * a.weight_stride;
    norm_row(static_cast<T*>(a.out) + row * a.hidden,
             static_cast<const T*>(a.input) + i * a.stride0 + j * a.stride1 + k * a.stride2, weight,
             a.hidden, a.epsilon);
  });
}

template <class T>
void run(const FusedAddRmsNormArgs& a) {
  cpu::parallel_for(a.n0 * a.n1 * a.n2, 4 * sizeof(T) * a.hidden, [&](int64_t row) {
    const int64_t k = row % a.n2, j = row / a.n2 % a.n1, i = row / a.n2 / a.n1;
    const T* weight = static_cast<const T*>(a.weight);
    if (weight != nullptr) weight += i * a.weight_stride;
    add_norm_row(
        static_cast<T*>(a.input) + i * a.input_stride0 + j * a.input_stride1 + k * a.input_stride2,
        static_cast<T*>(a.residual) + i * a.residual_stride0 + j * a.residual_stride1 +
            k * a.residual_stride2,
        weight, a.hidden, a.epsilon);
  });
}

template <class Args>
void by_dtype(const Args& a) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run<float>(a);
    case DType::kFloat16:
      return run<cpu::Half>(a);
    default:
      return run<cpu::BFloat16>(a);
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Stream /*stream*/) { by_dtype(args); }
void fused_add_rms_norm(const FusedAddRmsNormArgs& args, Stream /*stream*/) { by_dtype(args); }

}  // namespace elementwise
