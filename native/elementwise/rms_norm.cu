// RMSNorm on the GPU: a block owns a row and keeps it in registers between the sum of squares and
// the scaling. The number of threads and vectors a thread depends on the hidden size alone, and so
// does the order of the sum.
#include "elementwise/elementwise.h"
#include "prim/gpu_floats.h"

namespace elementwise {
namespace {

constexpr int kMaxHeld = 8;  // vectors a thread keeps; longer rows are read again
constexpr int kMaxThreads = 512;

__device__ float block_sum(float x) {
  __shared__ float partial[32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  if (blockDim.x <= 32) return x;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  const int warps = blockDim.x / 32;
  x = threadIdx.x % 32 < warps ? partial[threadIdx.x % 32] : 0.0f;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

struct Row {
  int64_t i, input, residual;  // index of dim 0, element offsets
};

template <class Args>
__device__ Row row_of(const Args& a, int64_t row, int64_t s0, int64_t s1, int64_t s2, int64_t r0,
                      int64_t r1, int64_t r2) {
  if (a.n1 * a.n2 == 1) return {row, row * s0, row * r0};
  const int64_t k = row % a.n2, j = row / a.n2 % a.n1, i = row / a.n2 / a.n1;
  return {i, i * s0 + j * s1 + k * s2, i * r0 + j * r1 + k * r2};
}

// kHeld vectors a thread, or 0: any number, read twice. kFused adds the residual first. kEarly
// loads the weights before the sum is known: quicker for a few rows, but the registers cost many
// rows bandwidth (H200, 8192 rows of 8192: 68 us late, 87 us early).
template <class T, int kHeld, bool kAligned, bool kFused, bool kEarly>
__global__ void __launch_bounds__(kMaxThreads)
    norm(const T* __restrict__ input, T* out, T* residual, const T* __restrict__ weight,
         FusedAddRmsNormArgs a) {
  constexpr int kN = gpu::kVec<T>, kKept = kHeld == 0 ? 1 : kHeld;
  const Row at = row_of(a, blockIdx.x, a.input_stride0, a.input_stride1, a.input_stride2,
                        a.residual_stride0, a.residual_stride1, a.residual_stride2);
  const T* x = input + at.input;
  T* z = kFused ? residual + at.residual : nullptr;
  T* y = kFused ? out + at.input : out + static_cast<int64_t>(blockIdx.x) * a.hidden;
  const T* w = weight == nullptr ? nullptr : weight + at.i * a.weight_stride;
  const int hidden = static_cast<int>(a.hidden), stride = blockDim.x * kN;
  gpu::Vec<T, kN> kept[kKept], add[kKept];

  auto fetch = [&](int first, gpu::Vec<T, kN>& v, gpu::Vec<T, kN>& r) {
    const int n = min(hidden - first, kN);
    gpu::load<kAligned>(v, x + first, n);
    if constexpr (kFused) gpu::load<kAligned>(r, z + first, n);
  };
  auto sum_of = [&](int first, gpu::Vec<T, kN>& v, const gpu::Vec<T, kN>& r) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      if constexpr (kFused) {
        v.at[j] = gpu::from_float<T>(gpu::to_float(v.at[j]) + gpu::to_float(r.at[j]));
      }
      const float f = gpu::to_float(v.at[j]);
      sum += kAligned || first + j < hidden ? f * f : 0.0f;
    }
    if constexpr (kFused) gpu::store<kAligned>(z + first, v, min(hidden - first, kN));
    return sum;
  };

  float sum = 0.0f;
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int first = threadIdx.x * kN + h * stride;
      if (first < hidden) fetch(first, kept[h], add[h]);
    }
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int first = threadIdx.x * kN + h * stride;
      if (first < hidden) sum += sum_of(first, kept[h], add[h]);
    }
  } else {
    for (int first = threadIdx.x * kN; first < hidden; first += stride) {
      fetch(first, kept[0], add[0]);
      sum += sum_of(first, kept[0], add[0]);
    }
  }
  gpu::Vec<T, kN> scale[kKept];
  auto weights = [&](int first, gpu::Vec<T, kN>& v) {
    if (w != nullptr) gpu::load<kAligned>(v, w + first, min(hidden - first, kN));
  };
  if constexpr (kHeld > 0 && kEarly) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int first = threadIdx.x * kN + h * stride;
      if (first < hidden) weights(first, scale[h]);
    }
  }
  const float factor = rsqrtf(block_sum(sum) / static_cast<float>(hidden) + a.epsilon);

  auto finish = [&](int first, const gpu::Vec<T, kN>& v, const gpu::Vec<T, kN>& scale) {
    const int n = min(hidden - first, kN);
    gpu::Vec<T, kN> result;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float normed = gpu::to_float(v.at[j]) * factor;
      result.at[j] =
          gpu::from_float<T>(w == nullptr ? normed : normed * gpu::to_float(scale.at[j]));
    }
    gpu::store<kAligned>(y + first, result, n);
  };
  if constexpr (kHeld > 0) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int first = threadIdx.x * kN + h * stride;
      if (first >= hidden) continue;
      if (!kEarly) weights(first, scale[h]);
      finish(first, kept[h], scale[h]);
    }
  } else {
    for (int first = threadIdx.x * kN; first < hidden; first += stride) {
      gpu::Vec<T, kN> v;
      gpu::load<kAligned>(v, (kFused ? z : x) + first, min(hidden - first, kN));
      weights(first, scale[0]);
      finish(first, v, scale[0]);
    }
  }
}

template <bool kFused>
void launch(const FusedAddRmsNormArgs& a, const void* input, void* out, gpu::Stream stream) {
  gpu::with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kItem = sizeof(T);
    const bool all = gpu::aligned(
        16, input, out, a.residual, a.weight, a.hidden * kItem, a.input_stride0 * kItem,
        a.input_stride1 * kItem, a.input_stride2 * kItem, a.residual_stride0 * kItem,
        a.residual_stride1 * kItem, a.residual_stride2 * kItem, a.weight_stride * kItem);
    const int64_t vecs = gpu::ceil_div(a.hidden, gpu::kVec<T>);
    // 256 threads until they would hold more than 4 vectors each.
    int threads = vecs <= 1024 ? 256 : kMaxThreads;
    if (vecs < 256) threads = static_cast<int>(gpu::ceil_div(vecs, 32) * 32);
    const int64_t held = gpu::ceil_div(vecs, threads);
    const unsigned rows = static_cast<unsigned>(a.n0 * a.n1 * a.n2);
    gpu::with_bool(all, [&](auto is_aligned) {
      constexpr bool kAligned = decltype(is_aligned)::value;
      auto go = [&](auto kernel) {
        kernel<<<rows, threads, 0, stream>>>(static_cast<const T*>(input), static_cast<T*>(out),
                                             static_cast<T*>(a.residual),
                                             static_cast<const T*>(a.weight), a);
      };
      gpu::with_bool(rows <= 128, [&](auto early) {
        constexpr bool kEarly = decltype(early)::value;
        if (held <= 1) {
          go(norm<T, 1, kAligned, kFused, kEarly>);
        } else if (held <= 2) {
          go(norm<T, 2, kAligned, kFused, kEarly>);
        } else if (held <= 4) {
          go(norm<T, 4, kAligned, kFused, kEarly>);
        } else if (held <= kMaxHeld) {
          go(norm<T, kMaxHeld, kAligned, kFused, false>);
        } else {
          go(norm<T, 0, kAligned, kFused, false>);
        }
      });
    });
  });
}

}  // namespace

void rms_norm(const RmsNormArgs& a, Stream stream) {
  FusedAddRmsNormArgs f{};
  f.weight = a.weight, f.weight_stride = a.weight_stride;
  f.n0 = a.n0, f.n1 = a.n1, f.n2 = a.n2, f.hidden = a.hidden;
  f.input_stride0 = a.stride0, f.input_stride1 = a.stride1, f.input_stride2 = a.stride2;
  f.epsilon = a.epsilon, f.dtype = a.dtype;
  launch<false>(f, a.input, a.out, gpu::stream_of(stream));
  GPU_CHECK_LAUNCH("rms_norm");
}

void fused_add_rms_norm(const FusedAddRmsNormArgs& a, Stream stream) {
  launch<true>(a, a.input, a.input, gpu::stream_of(stream));
  GPU_CHECK_LAUNCH("fused_add_rms_norm");
}

}  // namespace elementwise
