// Gated activations on the GPU: a thread owns a few 16-byte vectors of a row's output.
#include "elementwise/elementwise.h"
#include "prim/gpu_floats.h"

namespace elementwise {
namespace {

constexpr int kThreads = 256, kUnroll = 2;

template <Activation kAct>
__device__ float activate(float x) {
  // As torch writes them, so that the results are the same bits.
  if constexpr (kAct == Activation::kGelu) {
    return x * 0.5f * (1.0f + erff(x * 0.70710678118654752440f));
  } else if constexpr (kAct == Activation::kGeluTanh) {
    const float beta = 1.41421356237309504880f * 1.12837916709551257390f * 0.5f;
    return 0.5f * x * (1.0f + tanhf(beta * (x + 0.044715f * (x * x * x))));
  } else {
    return x / (1.0f + expf(-x));
  }
}

template <Activation kAct, class T>
__device__ T gate(T x, T y, float alpha, float limit) {
  if constexpr (kAct == Activation::kSwigluOai) {
    float g = gpu::to_float(x), u = gpu::to_float(y);
    g = g > limit ? limit : g;
    u = u > limit ? limit : u;
    u = u < -limit ? -limit : u;
    return gpu::from_float<T>((u + 1.0f) * g / (1.0f + expf(-alpha * g)));
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

template <Activation kAct, class T, bool kAligned, class Index>
__global__ void __launch_bounds__(kThreads) gated(ActivationArgs a, Index vecs, Index row_vecs) {
  constexpr int kN = gpu::kVec<T>;
  constexpr bool kPairs = kAct == Activation::kSwigluOai;
  const T* input = static_cast<const T*>(a.input);
  gpu::Vec<T, kN> first[kUnroll], second[kUnroll];
  const Index base = static_cast<Index>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  Index row[kUnroll], col[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Index i = base + u * kThreads;
    if (i >= vecs) continue;
    row[u] = i / row_vecs;
    col[u] = (i - row[u] * row_vecs) * kN;
    const int64_t left = a.d - col[u];
    const T* p = input + static_cast<int64_t>(row[u]) * 2 * a.d;
    if constexpr (kPairs) {
      const int64_t items = 2 * left;
      gpu::load<kAligned>(first[u], p + 2 * col[u], items < kN ? static_cast<int>(items) : kN);
      if (items > kN) {
        gpu::load<kAligned>(second[u], p + 2 * col[u] + kN,
                            items < 2 * kN ? static_cast<int>(items - kN) : kN);
      }
    } else {
      const int n = left < kN ? static_cast<int>(left) : kN;
      gpu::load<kAligned>(first[u], p + col[u], n);
      gpu::load<kAligned>(second[u], p + a.d + col[u], n);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (base + u * kThreads >= vecs) continue;
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
    const int64_t left = a.d - col[u];
    gpu::store<kAligned>(static_cast<T*>(a.out) + static_cast<int64_t>(row[u]) * a.d + col[u], out,
                         left < kN ? static_cast<int>(left) : kN);
  }
}

template <Activation kAct>
void run(const ActivationArgs& a, gpu::Stream stream) {
  gpu::with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t row_vecs = gpu::ceil_div(a.d, gpu::kVec<T>), vecs = a.rows * row_vecs;
    const unsigned blocks = static_cast<unsigned>(gpu::ceil_div(vecs, kThreads * kUnroll));
    gpu::with_bool(gpu::aligned(16, a.out, a.input, a.d * sizeof(T)), [&](auto is_aligned) {
      constexpr bool kAligned = decltype(is_aligned)::value;
      if (vecs < (1LL << 31)) {
        gated<kAct, T, kAligned, uint32_t><<<blocks, kThreads, 0, stream>>>(a, vecs, row_vecs);
      } else {
        gated<kAct, T, kAligned, int64_t><<<blocks, kThreads, 0, stream>>>(a, vecs, row_vecs);
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
