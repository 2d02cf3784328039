// Norm, RoPE and activation ops over raw pointers: one declaration, defined for the CPU in
// <op>_cpu.cpp and for CUDA in <op>.cu. Strides are in elements. The caller has checked everything.
#pragma once

#include <cstdint>

#include "prim/dtype.h"

namespace elementwise {

// Rows are (i, j, k) of [n0, n1, n2, hidden]; out is contiguous.
struct RmsNormArgs {
  void* out;
  const void* input;
  const void* weight;  // may be null
  int64_t n0, n1, n2, hidden;
  int64_t stride0, stride1, stride2;  // of input
  int64_t weight_stride;              // per i: 0 for one row of weights
  float epsilon;
  DType dtype;
};
void rms_norm(const RmsNormArgs& args, Stream stream);

struct FusedAddRmsNormArgs {
  void* input;
  void* residual;
  const void* weight;
  int64_t n0, n1, n2, hidden;
  int64_t input_stride0, input_stride1, input_stride2;
  int64_t residual_stride0, residual_stride1, residual_stride2;
  int64_t weight_stride;
  float epsilon;
  DType dtype;
};
void fused_add_rms_norm(const FusedAddRmsNormArgs& args, Stream stream);

struct RotaryArgs {
  const int64_t* positions;
  void* query;
  void* key;  // may be null
  const void* cos_sin;
  int64_t tokens, query_heads, key_heads;
  int64_t query_token_stride, query_head_stride, key_token_stride, key_head_stride;
  int64_t rot, offset, max_position, cos_sin_stride;
  bool neox, inverse;
  DType dtype, cos_sin_dtype;
};
void rotary_embedding(const RotaryArgs& args, Stream stream);

enum class Activation : int32_t { kSilu, kMulSilu, kGelu, kGeluTanh, kFatRelu, kSwigluOai };
struct ActivationArgs {
  void* out;
  const void* input;
  int64_t rows, d;
  Activation activation;
  float alpha;  // threshold of kFatRelu
  float limit;
  DType dtype;
};
void gated_activation(const ActivationArgs& args, Stream stream);

}  // namespace elementwise
