// The codecs of the quantized all-reduce on the host, for tests and for measuring their error:
// the same functions that the kernels use (collectives/quick_codec.h).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "collectives/quick_codec.h"
#include "torch/dtypes.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch_glue::check;
using torch_glue::dtype_of;
using torch_glue::fail;

constexpr int kWords = quick::kBlock / 4;  // of a block's codes, a byte each

// By way of what the wire carries, where nothing may look absent.
template <int B, DType H>
void encode_block(const float (&x)[quick::kBlock], uint16_t* extreme, uint32_t (&codes)[kWords]) {
  const uint16_t m = quick::away_from_zero<H>(quick::signed_extreme(quick::extreme_of(x)));
  const float inverse = quick::inverse_step<B>(quick::widen<H>(m));
  for (int i = 0; i < kWords; ++i) codes[i] = quick::encode4<B>(x + 4 * i, inverse);
  uint32_t words[B];
  quick::pack<B>(codes, words);
  const uint16_t sent = quick::seal(words, m);
  check(sent != quick::kAbsent, "quick_encode: an extreme value that looks absent");
  for (const uint32_t word : words) {
    check(word != quick::kAbsent, "quick_encode: a word that looks absent");
  }
  *extreme = quick::unseal(words, sent);
  quick::unpack<B>(words, codes);
}

template <int B, DType H>
void decode_block(uint16_t extreme, const uint32_t (&codes)[kWords], float* x) {
  const float step = quick::step_of<B>(quick::widen<H>(extreme));
  for (int i = 0; i < kWords; ++i) quick::decode4<B>(codes[i], step, x + 4 * i);
}

template <typename Body>
void by_codec(int64_t bits, bool bfloat16, const char* op, Body body) {
  const auto with = [&](auto b) {
    constexpr int B = decltype(b)::value;
    if (bfloat16) {
      body.template operator()<B, DType::kBFloat16>();
    } else {
      body.template operator()<B, DType::kFloat16>();
    }
  };
  if (bits == 8) return with(std::integral_constant<int, 8>{});
  if (bits == 6) return with(std::integral_constant<int, 6>{});
  if (bits == 4) return with(std::integral_constant<int, 4>{});
  fail(op, ": bits must be 8, 6 or 4, got ", bits);
}

// fp32 x [N, 32] -> m as int16 [N], codes as int32 [N, 8], a byte each.
std::tuple<Tensor, Tensor> quick_encode(Tensor x, int64_t bits, bool bfloat16) {
  constexpr const char* op = "quick_encode(x, bits, bfloat16)";
  check(x.is_cpu() && dtype_of(x) == ScalarType::Float && x.is_contiguous() && x.dim() == 2 &&
            x.size(1) == quick::kBlock,
        op, ": x must be a contiguous float32 CPU tensor [N, 32]");
  const auto cpu = torch::stable::Device(torch::headeronly::DeviceType::CPU, 0);
  const int64_t blocks = x.size(0);
  Tensor extremes = torch::stable::empty({blocks}, ScalarType::Short, std::nullopt, cpu);
  Tensor codes = torch::stable::empty({blocks, kWords}, ScalarType::Int, std::nullopt, cpu);
  const auto* from = static_cast<const float (*)[quick::kBlock]>(x.const_data_ptr());
  auto* m = static_cast<uint16_t*>(extremes.mutable_data_ptr());
  auto* to = static_cast<uint32_t (*)[kWords]>(codes.mutable_data_ptr());
  by_codec(bits, bfloat16, op, [&]<int B, DType H>() {
    for (int64_t n = 0; n < blocks; ++n) encode_block<B, H>(from[n], m + n, to[n]);
  });
  return {extremes, codes};
}

// The inverse: fp32 [N, 32].
Tensor quick_decode(Tensor extremes, Tensor codes, int64_t bits, bool bfloat16) {
  constexpr const char* op = "quick_decode(extremes, codes, bits, bfloat16)";
  check(extremes.is_cpu() && dtype_of(extremes) == ScalarType::Short && extremes.is_contiguous() &&
            codes.is_cpu() && dtype_of(codes) == ScalarType::Int && codes.is_contiguous() &&
            codes.numel() == extremes.numel() * kWords,
        op, ": extremes must be int16 [N] and codes int32 [N, 8], both on the CPU");
  const int64_t blocks = extremes.numel();
  Tensor x = torch::stable::empty({blocks, quick::kBlock}, ScalarType::Float, std::nullopt,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU, 0));
  const auto* m = static_cast<const uint16_t*>(extremes.const_data_ptr());
  const auto* from = static_cast<const uint32_t (*)[kWords]>(codes.const_data_ptr());
  auto* to = static_cast<float*>(x.mutable_data_ptr());
  by_codec(bits, bfloat16, op, [&]<int B, DType H>() {
    for (int64_t n = 0; n < blocks; ++n) decode_block<B, H>(m[n], from[n], to + n * quick::kBlock);
  });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(communicators, m) {
  m.def("quick_encode(Tensor x, int bits, bool bfloat16) -> (Tensor, Tensor)");
  m.def("quick_decode(Tensor extremes, Tensor codes, int bits, bool bfloat16) -> Tensor");
  // Runs on GPUs alone (quick_all_reduce_cuda.cpp); known here so that it can be traced anywhere.
  m.def(
      "quick_all_reduce(int fa, Tensor inp, Tensor(a!) out, int codec, Tensor(z!)? order=None) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(communicators, CPU, m) {
  m.impl("quick_encode", torch_glue::boxed<&quick_encode>);
  m.impl("quick_decode", torch_glue::boxed<&quick_decode>);
}
