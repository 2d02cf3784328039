// Between floats and fp8 values on the GPU: 8 elements per step, so that the 16-byte stores of a
// warp fill whole sectors.
#include "kvcache/cache.h"
#include "prim/gpu_fp8.h"

namespace kvcache {
namespace {

constexpr int kThreads = 256, kStep = 8;

// The floats of a step, in 16-byte parts.
template <class T>
struct Floats {
  static constexpr int kN = gpu::kVec<T>, kParts = kStep / kN;
  gpu::Kept<gpu::Vec<T, kN>> part[kParts];
};

template <class T, KvFormat kFormat, bool kToFp8, bool kAligned, int kUnroll, int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks) convert_all(ConvertFp8Args a) {
  gpu::launch_dependents();
  // Codes come into the L2 before their blocks need them. (For floats it is slower: H200.)
  constexpr uint32_t kCodes = kUnroll * kThreads * kStep, kAhead = gpu::kAheadBytes / kCodes;
  if (!kToFp8 && kAligned && gridDim.x > kAhead && threadIdx.x == 0) {
    auto ask = [&](uint32_t block) {  // the last one need not be whole
      const char* in = static_cast<const char*>(a.in) + static_cast<int64_t>(block) * kCodes;
      if (block + 1 < gridDim.x) gpu::prefetch_range(in, kCodes);
    };
    if (blockIdx.x < kAhead) ask(blockIdx.x);
    ask(blockIdx.x + kAhead);
  }
  gpu::dependency_wait();
  using Write = gpu::Quantizer<kToFp8 ? kFormat : KvFormat::kCopy, T>;
  const Write write = Write::for_warps(a.scale);
  using F = Floats<T>;
  const int64_t base =
      (static_cast<int64_t>(blockIdx.x) * kUnroll * kThreads + threadIdx.x) * kStep;
  F floats[kUnroll];
  gpu::Kept<gpu::Vec<uint8_t, kStep>> codes[kUnroll];
  const T* in = static_cast<const T*>(a.in);
  auto part = [](int64_t left, int p) {
    const int64_t n = left - p * F::kN;
    return n < 0 ? 0 : n < F::kN ? static_cast<int>(n) : F::kN;
  };
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = base + u * kThreads * kStep, left = a.n - i;
    if (left <= 0) break;
    if constexpr (kToFp8) {
      if (left >= kStep) {
#pragma unroll
        for (int p = 0; p < F::kParts; ++p) {
          gpu::load<kAligned>(floats[u].part[p], in + i + p * F::kN);
        }
      } else {
#pragma unroll
        for (int p = 0; p < F::kParts; ++p) {
          gpu::load<false>(floats[u].part[p], in + i + p * F::kN, part(left, p));
        }
      }
    } else {
      const uint8_t* from = static_cast<const uint8_t*>(a.in) + i;
      if (left >= kStep) {
        gpu::load<kAligned>(codes[u], from);
      } else {
        gpu::load<false>(codes[u], from, static_cast<int>(left));
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = base + u * kThreads * kStep, left = a.n - i;
    if (left <= 0) break;
    if constexpr (kToFp8) {
      uint32_t words[kStep / 4];
#pragma unroll
      for (int p = 0; p < F::kParts; ++p) {
        const auto part_codes = write(floats[u].part[p]);
        memcpy(words + p * F::kN / 4, &part_codes, F::kN);
      }
      gpu::Kept<gpu::Vec<uint8_t, kStep>> out_codes;
      out_codes.raw = {words[0], words[1]};
      uint8_t* out = static_cast<uint8_t*>(a.out) + i;
      if (left >= kStep) {
        gpu::store<kAligned>(out, out_codes);
      } else {
        gpu::store<false>(out, out_codes, static_cast<int>(left));
      }
    } else {
      gpu::Vec<T, kStep> values;
      gpu::dequantize<kFormat>(values, codes[u].get(), a.scale);
      T* out = static_cast<T*>(a.out) + i;
#pragma unroll
      for (int p = 0; p < F::kParts; ++p) {
        gpu::Vec<T, F::kN> v;
#pragma unroll
        for (int j = 0; j < F::kN; ++j) v.at[j] = values.at[p * F::kN + j];
        if (left >= kStep) {
          gpu::store<kAligned>(out + p * F::kN, v);
        } else {
          gpu::store<false>(out + p * F::kN, v, part(left, p));
        }
      }
    }
  }
}

}  // namespace

void convert_fp8(const ConvertFp8Args& a, Stream stream) {
  gpu::with_float(a.dtype, [&](auto type) {
    gpu::with_bool(a.to_fp8, [&](auto to_fp8) {
      gpu::with_bool(gpu::aligned(16, a.in, a.out), [&](auto is_aligned) {
        using T = decltype(type);
        constexpr bool kTo = decltype(to_fp8)::value, kAligned = decltype(is_aligned)::value;
        constexpr int kUnroll = kTo ? 2 : 1, kMinBlocks = kTo ? 6 : 8;
        constexpr int64_t kBlockItems = int64_t{kThreads} * kStep * kUnroll;
        const auto blocks = static_cast<unsigned>(gpu::ceil_div(a.n, kBlockItems));
        gpu::launch_overlapped(
            "convert_fp8",
            a.format == KvFormat::kE5M2
                ? convert_all<T, KvFormat::kE5M2, kTo, kAligned, kUnroll, kMinBlocks>
                : convert_all<T, KvFormat::kE4M3, kTo, kAligned, kUnroll, kMinBlocks>,
            dim3(blocks), kThreads, gpu::stream_of(stream), a);
      });
    });
  });
}

}  // namespace kvcache
