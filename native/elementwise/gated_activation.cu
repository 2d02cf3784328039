// Gated activations on the GPU: the vectors of all rows in one row of threads, a few per thread.
#include "elementwise/elementwise.h"
#include "prim/gpu_floats.h"

namespace elementwise {
namespace {

constexpr int kThreads = 128;

constexpr float kLog2E = 1.44269504f;

// 0.5 erfc(x / sqrt 2) for x >= 0, in the form of W. Press et al., Numerical Recipes, erfcc:
// t exp(-z^2 + polynomial of t), t = 1 / (1 + z / 2). For fp32 their polynomial, relative error
// 1.2e-7; for 16 bits one of degree 5 in base 2, fitted to a relative error of 9e-6.
template <class T>
__device__ float upper_tail(float x) {
  if constexpr (sizeof(T) == 2) {
    const float t = gpu::reciprocal_approx(fmaf(x, 0.35355339f, 1.0f));
    float p = 0.32787397f;
    p = fmaf(p, t, -1.01685696f);
    p = fmaf(p, t, 0.67775819f);
    p = fmaf(p, t, 0.37051038f);
    p = fmaf(p, t, 1.46788520f);
    p = fmaf(p, t, -2.82716582f);
    const float z = x * 0.84932180f;  // z^2 is (x^2 / 2) log2 e
    return t * gpu::exp2_approx(fmaf(-z, z, p));
  } else {
    const float z = x * 0.70710678f, t = __fdividef(1.0f, 1.0f + 0.5f * z);
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
    return 0.5f * t * gpu::exp2_approx(fmaf(-z, z, p) * kLog2E);
  }
}

// 1 / (1 + exp(-x)), to a few units in the last place of fp32 for moderate x; what is rounded to 16
// bits needs no more.
template <class T>
__device__ float logistic(float x) {
  if constexpr (sizeof(T) == 2) {
    return gpu::reciprocal_approx(1.0f + gpu::exp2_approx(-kLog2E * x));
  } else {
    return __fdividef(1.0f, 1.0f + fminf(expf(-x), 1e30f));
  }
}

// The result is to be rounded to T.
template <Activation kAct, class T>
__device__ float activate(float x) {
  if constexpr (kAct == Activation::kGelu) {
    // The tail is computed as such, so that large negative x keep their relative accuracy.
    const float tail = upper_tail<T>(fabsf(x));
    return x * (x > 0.0f ? 1.0f - tail : tail);
  } else if constexpr (kAct == Activation::kGeluTanh) {
    // 0.5 x (1 + tanh u) = x sigmoid(2u)
    return x * logistic<T>(x * fmaf(0.07135481f * x, x, 1.59576912f));
  } else {
    // As torch writes it, so that the results are the same bits.
    return gpu::divide_by_at_least_one<T>(x, 1.0f + expf(-x));
  }
}

// Two gated values. The activation is rounded to T before the product, as torch does.
template <Activation kAct, class T>
__device__ float2 gate(float2 x, float2 y, float alpha, float limit) {
  if constexpr (kAct == Activation::kSwigluOai) {
    auto one = [&](float g, float u) {
      g = g > limit ? limit : g;
      u = u > limit ? limit : u;
      u = u < -limit ? -limit : u;
      return g * logistic<T>(alpha * g) * (u + 1.0f);
    };
    return {one(x.x, y.x), one(x.y, y.y)};
  } else if constexpr (kAct == Activation::kFatRelu) {
    return {(x.x > alpha ? x.x : 0.0f) * y.x, (x.y > alpha ? x.y : 0.0f) * y.y};
  } else if constexpr (kAct == Activation::kMulSilu) {
    const float2 act = gpu::rounded<T>({activate<kAct, T>(y.x), activate<kAct, T>(y.y)});
    return {x.x * act.x, x.y * act.y};
  } else {
    const float2 act = gpu::rounded<T>({activate<kAct, T>(x.x), activate<kAct, T>(x.y)});
    return {act.x * y.x, act.y * y.y};
  }
}

// kN gated values of one place.
template <Activation kAct, class T, bool kAligned, int kN>
__device__ void gate_step(float alpha, float limit, const T* input, int64_t d, T* out, int n) {
  gpu::Kept<gpu::Vec<T, kN>> first, second;
  gpu::load<kAligned>(first, input, n);
  gpu::load<kAligned>(second, input + d, n);
  const gpu::Vec<T, kN> x = first.get(), y = second.get();
  gpu::Vec<T, kN> result;
#pragma unroll
  for (int j = 0; j < kN; j += 2) {
    const float2 both = gate<kAct, T>(gpu::pair_at(x, j), gpu::pair_at(y, j), alpha, limit);
    gpu::set_pair(result, j, both);
  }
  gpu::store<kAligned>(out, result, n);
}

// Gate and up value from the two halves of a row, kN of them a thread. Blocks that follow each
// other take memory that follows: DRAM likes it best. Index is uint32_t where the elements of the
// input can be counted with it.
template <Activation kAct, class T, class Index, bool kAligned, int kN>
__global__ void __launch_bounds__(kThreads)
    gated_halves(ActivationArgs a, Index steps, gpu::FastDivisor row_steps) {
  gpu::launch_dependents();
  const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= steps) return;
  const auto [row, step] = gpu::place_of(i, row_steps);
  const Index d = static_cast<Index>(a.d), col = step * kN, at = row * d + col;
  const T* input = static_cast<const T*>(a.input) + (row * d + at);
  gpu::prefetch_early(input);
  gpu::prefetch_early(input + d);
  gpu::dependency_wait();
  gate_step<kAct, T, kAligned, kN>(a.alpha, a.limit, input, d, static_cast<T*>(a.out) + at,
                                   kAligned ? kN : min(static_cast<int>(d - col), kN));
}

// The same for a few rows, one a blockIdx.y: as little as can be before and after the loads, and
// few parameters, which a multiprocessor fetches line by line.
template <Activation kAct, class T, int kN>
__global__ void __launch_bounds__(kThreads)
    gated_few(const T* input, T* out, uint32_t d, float alpha, float limit) {
  const uint32_t col = (blockIdx.x * kThreads + threadIdx.x) * kN, at = blockIdx.y * d + col;
  input += blockIdx.y * d + at;
  out += at;
  // Never true. Compilers would read parameters when they are needed, but not across a branch.
  if ((reinterpret_cast<uint64_t>(input) | reinterpret_cast<uint64_t>(out)) == 0) return;
  gpu::begin_overlapped();
  if (col < d) gate_step<kAct, T, true, kN>(alpha, limit, input, d, out, kN);
}

// One row of whole blocks, few enough of them to start after the predecessor: nothing is left to
// check or to wait for.
template <Activation kAct, class T, int kN>
__global__ void __launch_bounds__(kThreads)
    gated_row(const T* input, T* out, uint32_t d, float alpha, float limit) {
  const uint32_t col = (blockIdx.x * kThreads + threadIdx.x) * kN;
  gate_step<kAct, T, true, kN>(alpha, limit, input + col, d, out + col, kN);
}

// Gate and up value side by side: a vector of pairs becomes half a vector, and rows do not matter.
template <Activation kAct, class T, bool kAligned, int kUnroll>
__global__ void __launch_bounds__(kThreads) gated_pairs(ActivationArgs a, int64_t items) {
  gpu::begin_overlapped();
  constexpr int kN = gpu::kVec<T>, kOut = kN / 2;
  const int64_t base =
      (static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x) * kOut;
  gpu::Kept<gpu::Vec<T, kN>> pairs[kUnroll];
  auto left = [&](int u) { return items - (base + u * kThreads * kOut); };
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (left(u) <= 0) break;
    gpu::load<kAligned>(pairs[u], static_cast<const T*>(a.input) + 2 * (base + u * kThreads * kOut),
                        left(u) < kOut ? static_cast<int>(2 * left(u)) : kN);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (left(u) <= 0) break;
    const gpu::Vec<T, kN> x = pairs[u].get();
    gpu::Vec<T, kOut> out;
#pragma unroll
    for (int j = 0; j < kOut; j += 2) {
      const float2 one = gpu::pair_at(x, 2 * j), two = gpu::pair_at(x, 2 * j + 2);
      gpu::set_pair(out, j, gate<kAct, T>({one.x, two.x}, {one.y, two.y}, a.alpha, a.limit));
    }
    gpu::store<kAligned>(static_cast<T*>(a.out) + base + u * kThreads * kOut, out,
                         left(u) < kOut ? static_cast<int>(left(u)) : kOut);
  }
}

template <Activation kAct>
void run(const ActivationArgs& a, gpu::Stream stream) {
  constexpr bool kPairs = kAct == Activation::kSwigluOai;
  gpu::with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kStep = kPairs ? gpu::kVec<T> / 2 : gpu::kVec<T>;
    const int64_t items = a.rows * a.d;
    // Pairs are one long row.
    const int64_t vecs = kPairs ? gpu::ceil_div(items, kStep) : a.rows * gpu::ceil_div(a.d, kStep);
    const bool all =
        gpu::aligned(16, a.out, a.input, (kPairs ? items : a.d) * sizeof(T) * (kPairs ? 2 : 1));
    auto go = [&](auto kernel, int64_t steps, int64_t rows, auto... arguments) {
      const dim3 grid(static_cast<unsigned>(gpu::ceil_div(steps, kThreads)),
                      static_cast<unsigned>(rows));
      gpu::launch_overlapped("gated_activation", kernel, grid, kThreads, stream, arguments...);
    };
    if constexpr (kPairs) {
      gpu::with_bool(all, [&](auto is_aligned) {
        constexpr bool kAligned = decltype(is_aligned)::value;
        const bool few = vecs < 1 << 16;  // more blocks, each with less to wait for
        few ? go(gated_pairs<kAct, T, kAligned, 1>, vecs, 1, a, items)
            : go(gated_pairs<kAct, T, kAligned, 2>, gpu::ceil_div(vecs, 2), 1, a, items);
      });
    } else {
      auto halves = [&](auto kernel, auto index) {
        const int64_t row_steps = gpu::ceil_div(a.d, kStep), steps = a.rows * row_steps;
        go(kernel, steps, 1, a, static_cast<decltype(index)>(steps), gpu::FastDivisor(row_steps));
      };
      if (!all || !gpu::narrow(2 * items)) {
        halves(gated_halves<kAct, T, uint64_t, false, kStep>, uint64_t{});
      } else if (vecs < 1 << 13) {
        constexpr int kFew = 2;  // more blocks, each with less to compute
        constexpr int64_t kBlock = kFew * kThreads;
        const bool row = a.rows == 1 && a.d % kBlock == 0 && a.d / kBlock < gpu::kSmallGrid;
        go(row ? gated_row<kAct, T, kFew> : gated_few<kAct, T, kFew>, a.d / kFew, a.rows,
           static_cast<const T*>(a.input), static_cast<T*>(a.out), static_cast<uint32_t>(a.d),
           a.alpha, a.limit);
      } else {
        halves(gated_halves<kAct, T, uint32_t, true, kStep>, uint32_t{});
      }
    }
  });
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
