// Gated activations on the GPU: a thread owns a few 16-byte vectors of a row's output.
#include "elementwise/elementwise.h"
#include "prim/gpu_floats.h"

namespace elementwise {
namespace {

constexpr int kThreads = 128;

// 0.5 erfc(z) for z >= 0: W. Press et al., Numerical Recipes, erfcc; relative error 1.2e-7.
__device__ float half_erfc(float z) {
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = fmaf(p, t, -0.82215223f);
  p = fmaf(p, t, 1.48851587f);
  p = fmaf(p, t, -1.13520398f);
  p = fmaf(p, t, 0.27886807f);
  p = fmaf(p, t, -0.18628806f);
  p = fmaf(p, t, 0.09678418f);
  p = fmaf(p, t, 0.37409196f);
  p = fmaf(p, t, 1.00002368f);
  p = fmaf(p, t, -1.26551223f);
  return 0.5f * t * gpu::exp2_approx(fmaf(-z, z, p) * 1.44269504f);
}

template <Activation kAct>
__device__ float activate(float x) {
  if constexpr (kAct == Activation::kGelu) {
    // The tail comes from erfc, so that large negative x keep their relative accuracy.
    const float tail = half_erfc(fabsf(x) * 0.70710678f);
    return x * (x > 0.0f ? 1.0f - tail : tail);
  } else if constexpr (kAct == Activation::kGeluTanh) {
    // 0.5 x (1 + tanh u) = x sigmoid(2u)
    const float u2 = 1.59576912f * fmaf(0.044715f * x * x, x, x);
    return __fdividef(x, 1.0f + fminf(expf(-u2), 1e30f));
  } else {
    // As torch writes it, so that the results are the same bits.
    return gpu::divide_by_at_least_one(x, 1.0f + expf(-x));
  }
}

template <Activation kAct, class T>
__device__ T gate(T x, T y, float alpha, float limit) {
  if constexpr (kAct == Activation::kSwigluOai) {
    float g = gpu::to_float(x), u = gpu::to_float(y);
    g = g > limit ? limit : g;
    u = u > limit ? limit : u;
    u = u < -limit ? -limit : u;
    return gpu::from_float<T>(gpu::divide_by_at_least_one((u + 1.0f) * g, 1.0f + expf(-alpha * g)));
  } else if constexpr (kAct == Activation::kFatRelu) {
    const float g = gpu::to_float(x);
    return gpu::from_float<T>((g > alpha ? g : 0.0f) * gpu::to_float(y));
  } else if constexpr (kAct == Activation::kMulSilu) {
    const T act = gpu::from_float<T>(activate<kAct>(gpu::to_float(y)));
    return gpu::from_float<T>(gpu::to_float(x) * gpu::to_float(act));
  } else {
    const T act = gpu::from_float<T>(activate<kAct>(gpu::to_float(x)));
    return gpu::from_float<T>(gpu::to_float(act) * gpu::to_float(y));
  }
}

template <Activation kAct, class T, bool kAligned, int kUnroll>
__global__ void __launch_bounds__(kThreads) gated(ActivationArgs a, int row_vecs) {
  constexpr int kN = gpu::kVec<T>;
  constexpr bool kPairs = kAct == Activation::kSwigluOai;
  const int64_t row = blockIdx.x;
  const T* input = static_cast<const T*>(a.input) + row * 2 * a.d;
  T* output = static_cast<T*>(a.out) + row * a.d;
  gpu::Vec<T, kN> first[kUnroll], second[kUnroll];
  const int base = blockIdx.y * (kThreads * kUnroll) + threadIdx.x;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = base + u * kThreads;
    if (i >= row_vecs) break;
    const int64_t col = int64_t{i} * kN, left = a.d - col;
    if constexpr (kPairs) {
      const int64_t items = 2 * left;
      gpu::load<kAligned>(first[u], input + 2 * col, items < kN ? static_cast<int>(items) : kN);
      if (items > kN) {
        gpu::load<kAligned>(second[u], input + 2 * col + kN,
                            items < 2 * kN ? static_cast<int>(items - kN) : kN);
      }
    } else {
      const int n = left < kN ? static_cast<int>(left) : kN;
      gpu::load<kAligned>(first[u], input + col, n);
      gpu::load<kAligned>(second[u], input + a.d + col, n);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int i = base + u * kThreads;
    if (i >= row_vecs) break;
    gpu::Vec<T, kN> out;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if constexpr (kPairs) {
        const gpu::Vec<T, kN>& from = 2 * j < kN ? first[u] : second[u];
        out.at[j] = gate<kAct>(from.at[2 * j % kN], from.at[2 * j % kN + 1], a.alpha, a.limit);
      } else {
        out.at[j] = gate<kAct>(first[u].at[j], second[u].at[j], a.alpha, a.limit);
      }
    }
    const int64_t col = int64_t{i} * kN, left = a.d - col;
    gpu::store<kAligned>(output + col, out, left < kN ? static_cast<int>(left) : kN);
  }
}

template <Activation kAct>
void run(const ActivationArgs& a, gpu::Stream stream) {
  gpu::with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t row_vecs = gpu::ceil_div(a.d, gpu::kVec<T>);
    gpu::with_bool(gpu::aligned(16, a.out, a.input, a.d * sizeof(T)), [&](auto is_aligned) {
      constexpr bool kAligned = decltype(is_aligned)::value;
      auto go = [&](auto kernel, int unroll) {
        const dim3 grid(static_cast<unsigned>(a.rows),
                        static_cast<unsigned>(gpu::ceil_div(row_vecs, kThreads * unroll)));
        kernel<<<grid, kThreads, 0, stream>>>(a, static_cast<int>(row_vecs));
      };
      // Few rows: more blocks, each with less to wait for.
      if (a.rows * row_vecs < 1 << 16) {
        go(gated<kAct, T, kAligned, 1>, 1);
      } else {
        go(gated<kAct, T, kAligned, 2>, 2);
      }
    });
  });
  GPU_CHECK_LAUNCH("gated_activation");
}

}  // namespace

void gated_activation(const ActivationArgs& a, Stream stream) {
  const gpu::Stream s = gpu::stream_of(stream);
  switch (a.activation) {
    case Activation::kSilu:
      return run<Activation::kSilu>(a, s);
    case Activation::kMulSilu:
      return run<Activation::kMulSilu>(a, s);
    case Activation::kGelu:
      return run<Activation::kGelu>(a, s);
    case Activation::kGeluTanh:
      return run<Activation::kGeluTanh>(a, s);
    case Activation::kFatRelu:
      return run<Activation::kFatRelu>(a, s);
    case Activation::kSwigluOai:
      return run<Activation::kSwigluOai>(a, s);
  }
}

}  // namespace elementwise
