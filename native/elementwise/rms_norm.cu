// RMSNorm on the GPU: a block owns a row and keeps it in registers between the sum of squares and
// the scaling. A few rows are spread over more blocks: rms_norm_parts.cuh, rms_norm_clusters.cuh.
#include "elementwise/rms_norm.cuh"
#include "elementwise/rms_norm_clusters.cuh"
#include "elementwise/rms_norm_parts.cuh"

namespace elementwise {
namespace {

constexpr int kMaxHeld = 8;      // vectors a thread keeps; longer rows are read again
constexpr int kMaxGroups = 128;  // of rows that are kept
constexpr int kLongThreads = 512;
constexpr int kAhead = 132;  // rows; more of them leave the L2 before they are read (H200)

// The sums over the warp of kCount values per lane, each added as warp_sum() adds it. Lane l ends
// with that of value owner_value<kCount>(l): at each step but the last ones a lane passes on half
// of its values.
template <int kCount>
__device__ float warp_sums(float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return warp_sum(x[0]);
  } else {
    int offset = 16;
#pragma unroll
    for (int width = kCount / 2; width > 0; width /= 2, offset /= 2) {
      const bool upper = threadIdx.x & offset;
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float given = upper ? x[i] : x[i + width];
        const float kept = upper ? x[i + width] : x[i];
        x[i] = kept + gpu::shuffle_xor(given, offset);
      }
    }
#pragma unroll
    for (; offset > 0; offset /= 2) x[0] += gpu::shuffle_xor(x[0], offset);
    return x[0];
  }
}
template <int kCount>
__device__ int owner_value(int lane) {
  return lane / (32 / kCount);
}

// kHeld vectors per thread. kEarly loads the weights before the sum is known: quicker for a few
// rows; for many rows their registers are worth more as further rows.
template <class T, int kHeld, int kThreads, int kMinBlocks, bool kAligned, bool kFused, bool kEarly>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    norm(const T* input, T* out, T* residual, const T* weight, NormArgs a) {
  gpu::launch_dependents();
  using N = Norm<T, kAligned, kFused>;
  using K = typename N::K;
  const N n{input, out, residual, weight, a};
  __shared__ float partial[kMaxGroups];
  const int hidden = static_cast<int>(a.hidden), stride = blockDim.x * N::kN;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int64_t row = blockIdx.x;
  const Row at = row_of(a, row);
  auto first_of = [&](int h) { return static_cast<int>(threadIdx.x) * N::kN + h * stride; };
  auto fetch_weights = [&](int first, K& v) {
    if (weight == nullptr) return;
    gpu::load<kAligned>(v, weight + at.i * a.weight_stride + first, n.count(first));
  };
  T* z = kFused ? residual + at.residual : nullptr;

  // Rows that a later block will take come into the L2 meanwhile: the memory has work while blocks
  // sum. The first blocks prefetch their own, which the wait below covers.
  if (kAligned && gridDim.x > kAhead && threadIdx.x == 0) {
    auto ask = [&](int64_t r) {
      const Row to = row_of(a, r);
      gpu::prefetch_range(input + to.input, hidden * sizeof(T));
      if constexpr (kFused) gpu::prefetch_range(residual + to.residual, hidden * sizeof(T));
    };
    if (row < kAhead) ask(row);
    if (row + kAhead < gridDim.x) ask(row + kAhead);
  }
  gpu::dependency_wait();

  K v[kHeld], add[kHeld], w[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int first = first_of(h);
    if (first >= hidden) break;
    gpu::load<kAligned>(v[h], input + at.input + first, n.count(first));
    if constexpr (kFused) gpu::load<kAligned>(add[h], z + first, n.count(first));
  }
  if constexpr (kEarly) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (first_of(h) < hidden) fetch_weights(first_of(h), w[h]);
    }
  }
  float sums[kHeld];
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int first = first_of(h);
    sums[h] = first < hidden ? n.square(v[h], add[h], z, first) : 0.0f;
  }
  const float sum = warp_sums(sums);
  if (lane % (32 / kHeld) == 0) partial[owner_value<kHeld>(lane) * warps + warp] = sum;
  __syncthreads();
  const float factor = factor_of(partial, kHeld * warps, a);
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int first = first_of(h);
    if (first >= hidden) break;
    if constexpr (!kEarly) fetch_weights(first, w[h]);
    n.scale(v[h], w[h], factor, n.target(at, row), first);
  }
}

// Rows of any length, read twice.
template <class T, bool kAligned, bool kFused>
__global__ void __launch_bounds__(kLongThreads)
    norm_long(const T* input, T* out, T* residual, const T* weight, NormArgs a) {
  gpu::begin_overlapped();
  using N = Norm<T, kAligned, kFused>;
  const N n{input, out, residual, weight, a};
  __shared__ float partial[kLongThreads / 32];
  const int hidden = static_cast<int>(a.hidden), stride = kLongThreads * N::kN;
  const int64_t row = blockIdx.x;
  const Row at = row_of(a, row);
  const T* x = input + at.input;
  T* z = kFused ? residual + at.residual : nullptr;
  float sum = 0.0f;
  for (int first = threadIdx.x * N::kN; first < hidden; first += stride) {
    typename N::K v, r;
    gpu::load<kAligned>(v, x + first, n.count(first));
    if constexpr (kFused) gpu::load<kAligned>(r, z + first, n.count(first));
    sum += n.square(v, r, z, first);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  const float factor = factor_of(partial, kLongThreads / 32, a);
  for (int first = threadIdx.x * N::kN; first < hidden; first += stride) {
    typename N::K v, w;
    gpu::load<kAligned>(v, (kFused ? z : x) + first, n.count(first));
    if (weight != nullptr) {
      gpu::load<kAligned>(w, weight + at.i * a.weight_stride + first, n.count(first));
    }
    n.scale(v, w, factor, n.target(at, row), first);
  }
}

template <bool kFused>
void launch(const char* op, const FusedAddRmsNormArgs& args, const void* input, void* out,
            gpu::Stream stream) {
  const NormArgs a = {args, 1.0f / static_cast<float>(args.hidden)};
  gpu::with_float(a.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t kItem = sizeof(T);
    const bool all = gpu::aligned(
        16, input, out, a.residual, a.weight, a.hidden * kItem, a.input_stride0 * kItem,
        a.input_stride1 * kItem, a.input_stride2 * kItem, a.residual_stride0 * kItem,
        a.residual_stride1 * kItem, a.residual_stride2 * kItem, a.weight_stride * kItem);
    const int64_t vecs = gpu::ceil_div(a.hidden, gpu::kVec<T>), rows = a.n0 * a.n1 * a.n2;
    gpu::with_bool(all, [&](auto is_aligned) {
      constexpr bool kAligned = decltype(is_aligned)::value;
      auto go = [&](auto kernel, int64_t most) {
        const int64_t threads = vecs < most ? gpu::ceil_div(vecs, 32) * 32 : most;
        gpu::launch_overlapped(op, kernel, dim3(static_cast<unsigned>(rows)),
                               static_cast<int>(threads), stream, static_cast<const T*>(input),
                               static_cast<T*>(out), static_cast<T*>(a.residual),
                               static_cast<const T*>(a.weight), a);
      };
      if (kAligned && !kFused && divides_into_parts(a, input, out, vecs, kItem)) {
        launch_in_parts<T>(op, a, input, out, vecs, stream);
      } else if (kAligned && spreads_over_clusters(a, vecs, kFused)) {
        launch_in_clusters<T, kFused>(op, a, input, out, vecs, stream);
      } else if (vecs > kMaxHeld * kLongThreads) {
        go(norm_long<T, kAligned, kFused>, kLongThreads);
      } else if (vecs > 1024) {
        go(norm<T, kMaxHeld, 512, 1, kAligned, kFused, false>, 512);
      } else if (rows <= 256) {  // few vectors per thread: the least to wait for
        kFused ? go(norm<T, 2, 512, 1, kAligned, kFused, true>, 512)
               : go(norm<T, 1, 1024, 1, kAligned, kFused, true>, 1024);
      } else if constexpr (kFused) {
        vecs <= 512 ? go(norm<T, 2, 256, 6, kAligned, kFused, false>, 256)
                    : go(norm<T, 1, 1024, 2, kAligned, kFused, true>, 1024);
      } else {
        vecs <= 512 ? go(norm<T, 2, 256, 8, kAligned, kFused, false>, 256)
                    : go(norm<T, 2, 512, 4, kAligned, kFused, false>, 512);
      }
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
  launch<false>("rms_norm", f, a.input, a.out, gpu::stream_of(stream));
}

void fused_add_rms_norm(const FusedAddRmsNormArgs& a, Stream stream) {
  launch<true>("fused_add_rms_norm", a, a.input, a.input, gpu::stream_of(stream));
}

}  // namespace elementwise
