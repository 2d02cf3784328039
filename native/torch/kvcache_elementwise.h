// Norm, RoPE and activation ops: tensors checked and turned into the arguments of the kernels. One
// text for both devices; each library registers it under its own key.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "elementwise/elementwise.h"
#include "torch/kvcache_checks.h"

#define KVCACHE_ELEMENTWISE_OPS(X) \
  X(rms_norm)                      \
  X(fused_add_rms_norm)            \
  X(rotary_embedding)              \
  X(silu_and_mul)                  \
  X(mul_and_silu)                  \
  X(gelu_and_mul)                  \
  X(gelu_tanh_and_mul)             \
  X(fatrelu_and_mul)               \
  X(swigluoai_and_mul)

namespace kvcache_glue {
namespace {

// weight [h], [G, h] with G == n0, or absent; returns the stride per row of dim 0.
int64_t check_weight(const Checks& checks, const std::optional<Arg>& weight, const Arg& input) {
  if (!weight) return 0;
  const int64_t hidden = input.size(-1);
  checks.on_device(*weight);
  checks.dtype(*weight, input.dtype);
  const bool row = weight->dim == 1 && weight->size(0) == hidden;
  const bool rows =
      weight->dim == 2 && weight->size(0) == input.size(0) && weight->size(1) == hidden;
  if (!row && !rows) {
    checks.fail("weight", "shape " + weight->shape(),
                "[" + std::to_string(hidden) + "] or [" + std::to_string(input.size(0)) + ", " +
                    std::to_string(hidden) + "]");
  }
  checks.last_contiguous(*weight);
  return row ? 0 : weight->stride(0);
}

std::optional<Arg> optional_arg(const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return Arg(name, *tensor);
}

void rms_norm(const Tensor& result, const Tensor& given, const std::optional<Tensor>& weight,
              double epsilon) {
  Tensor input_tensor = given;
  Arg input("input", input_tensor), out("result", result);
  const Checks checks("rms_norm", input);
  checks.rank(input, 2, 4);
  const DType dtype = checks.float_dtype(input);
  checks.on_device(out);
  checks.same_shape(out, input);
  checks.dtype(out, input.dtype);
  checks.contiguous(out);
  const auto w = optional_arg("weight", weight);
  const int64_t weight_stride = check_weight(checks, w, input);
  if (input.numel() == 0) return;
  if (!input.dense_from(input.dim - 1)) {
    input_tensor = torch::stable::contiguous(given);
    input = Arg("input", input_tensor);
  }
  elementwise::RmsNormArgs a{};
  a.out = out.data;
  a.input = input.data;
  a.weight = w ? w->data : nullptr;
  const int64_t r = input.dim;
  a.n0 = input.size(0), a.stride0 = input.stride(0);
  a.n1 = r > 2 ? input.size(1) : 1, a.stride1 = r > 2 ? input.stride(1) : 0;
  a.n2 = r > 3 ? input.size(2) : 1, a.stride2 = r > 3 ? input.stride(2) : 0;
  a.hidden = input.size(-1);
  a.weight_stride = weight_stride;
  a.epsilon = static_cast<float>(epsilon);
  a.dtype = dtype;
  const Launch launch(input);
  elementwise::rms_norm(a, launch.stream);
}

void fused_add_rms_norm(const Tensor& input_tensor, const Tensor& residual_tensor,
                        const std::optional<Tensor>& weight, double epsilon) {
  const Arg input("input", input_tensor), residual("residual", residual_tensor);
  const Checks checks("fused_add_rms_norm", input);
  checks.rank(input, 2, 4);
  const DType dtype = checks.float_dtype(input);
  checks.last_contiguous(input);
  checks.on_device(residual);
  checks.same_shape(residual, input);
  checks.dtype(residual, input.dtype);
  checks.last_contiguous(residual);
  const auto w = optional_arg("weight", weight);
  const int64_t weight_stride = check_weight(checks, w, input);
  if (input.numel() == 0) return;
  elementwise::FusedAddRmsNormArgs a{};
  a.input = input.data;
  a.residual = residual.data;
  a.weight = w ? w->data : nullptr;
  const int64_t r = input.dim;
  a.n0 = input.size(0), a.input_stride0 = input.stride(0), a.residual_stride0 = residual.stride(0);
  a.n1 = a.n2 = 1;
  if (r > 2) {
    a.n1 = input.size(1), a.input_stride1 = input.stride(1);
    a.residual_stride1 = residual.stride(1);
  }
  if (r > 3) {
    a.n2 = input.size(2), a.input_stride2 = input.stride(2);
    a.residual_stride2 = residual.stride(2);
  }
  a.hidden = input.size(-1);
  a.weight_stride = weight_stride;
  a.epsilon = static_cast<float>(epsilon);
  a.dtype = dtype;
  const Launch launch(input);
  elementwise::fused_add_rms_norm(a, launch.stream);
}

// Query or key of rotary_embedding: heads, token stride and head stride of its own layout.
struct RotaryOperand {
  int64_t heads, token_stride, head_stride;
};
RotaryOperand check_rotary(const Checks& checks, const Arg& x, const Arg& positions,
                           int64_t head_size) {
  const bool flat = x.dim == positions.dim + 1;
  if (!flat && x.dim != positions.dim + 2) {
    checks.fail(x.name, "shape " + x.shape(),
                "the shape of positions, " + positions.shape() +
                    ", followed by [H * head_size] or [H, head_size],");
  }
  for (int64_t d = 0; d < positions.dim; ++d) {
    checks.size(x, d, positions.size(d), "as positions");
  }
  const int64_t last = x.size(-1);
  if (flat ? last % head_size != 0 : last != head_size) {
    checks.fail(x.name, "shape " + x.shape(),
                std::string(flat ? "a multiple of " : "") + "head_size " +
                    std::to_string(head_size) + " in the last dimension");
  }
  checks.last_contiguous(x);
  const int64_t leading = positions.dim;
  if (leading == 2 && x.size(0) > 1 && x.size(1) > 1 && x.stride(0) != x.size(1) * x.stride(1)) {
    checks.fail(x.name, "stride " + std::to_string(x.stride(0)) + " in dimension 0",
                "a tensor whose batch and sequence collapse to one dimension");
  }
  const int64_t token_stride = leading == 2 && x.size(1) == 1 ? x.stride(0) : x.stride(leading - 1);
  return {flat ? last / head_size : x.size(-2), token_stride, flat ? head_size : x.stride(-2)};
}

void rotary_embedding(const Tensor& positions_tensor, const Tensor& query_tensor,
                      const std::optional<Tensor>& key_tensor, int64_t head_size,
                      const Tensor& cos_sin_tensor, bool is_neox, int64_t rope_dim_offset,
                      bool inverse) {
  const Arg query("query", query_tensor), positions("positions", positions_tensor);
  const Arg cos_sin("cos_sin_cache", cos_sin_tensor);
  const Checks checks("rotary_embedding", query);
  const DType dtype = checks.float_dtype(query);
  checks.on_device(positions);
  checks.rank(positions, 1, 2);
  checks.dtype(positions, ScalarType::Long);
  checks.contiguous(positions);
  checks.value(head_size > 0, "head_size", head_size, "a positive size");
  checks.on_device(cos_sin);
  checks.rank(cos_sin, 2, 2);
  const DType cos_sin_dtype = checks.float_dtype(cos_sin);
  checks.last_contiguous(cos_sin);
  const int64_t rot = cos_sin.size(1);
  checks.value(rot > 0 && rot % 2 == 0, "cos_sin_cache", rot, "an even number of columns");
  checks.value(rope_dim_offset >= 0 && rope_dim_offset + rot <= head_size, "rope_dim_offset",
               rope_dim_offset, "an offset of 0 to head_size - cos_sin_cache.size(1)");
  const RotaryOperand q = check_rotary(checks, query, positions, head_size);
  elementwise::RotaryArgs a{};
  if (key_tensor) {
    const Arg key("key", *key_tensor);
    checks.on_device(key);
    checks.dtype(key, query.dtype);
    const RotaryOperand k = check_rotary(checks, key, positions, head_size);
    if (k.heads == 0 || q.heads % k.heads != 0) {
      checks.fail("key", std::to_string(k.heads) + " heads",
                  "a divisor of the " + std::to_string(q.heads) + " heads of query");
    }
    a.key = key.data, a.key_heads = k.heads;
    a.key_token_stride = k.token_stride, a.key_head_stride = k.head_stride;
  }
  a.positions = static_cast<const int64_t*>(positions.data);
  a.query = query.data, a.query_heads = q.heads;
  a.query_token_stride = q.token_stride, a.query_head_stride = q.head_stride;
  a.cos_sin = cos_sin.data;
  a.tokens = positions.numel();
  a.rot = rot, a.offset = rope_dim_offset;
  a.max_position = cos_sin.size(0), a.cos_sin_stride = cos_sin.stride(0);
  a.neox = is_neox, a.inverse = inverse;
  a.dtype = dtype, a.cos_sin_dtype = cos_sin_dtype;
  if (a.tokens == 0) return;
  const Launch launch(query);
  elementwise::rotary_embedding(a, launch.stream);
}

void gated(const char* op, const char* out_name, elementwise::Activation activation,
           const Tensor& out_tensor, const Tensor& input_tensor, double alpha, double limit) {
  const Arg out(out_name, out_tensor), input("input", input_tensor);
  const Checks checks(op, input);
  const DType dtype = checks.float_dtype(input);
  checks.rank(input, 1, 64);
  checks.contiguous(input);
  checks.value(input.size(-1) % 2 == 0, "input", input.size(-1),
               "an even size of the last dimension");
  checks.on_device(out);
  checks.dtype(out, input.dtype);
  checks.contiguous(out);
  bool ok = out.dim == input.dim && out.size(-1) * 2 == input.size(-1);
  for (int64_t d = 0; ok && d + 1 < out.dim; ++d) ok = out.size(d) == input.size(d);
  if (!ok) {
    checks.fail(out_name, "shape " + out.shape(),
                "the shape of input, " + input.shape() + ", with half the last dimension");
  }
  elementwise::ActivationArgs a{};
  a.out = out.data, a.input = input.data;
  a.d = out.size(-1);
  if (out.numel() == 0) return;
  a.rows = out.numel() / a.d;
  a.activation = activation;
  a.alpha = static_cast<float>(alpha), a.limit = static_cast<float>(limit);
  a.dtype = dtype;
  const Launch launch(input);
  elementwise::gated_activation(a, launch.stream);
}

using elementwise::Activation;
void silu_and_mul(const Tensor& result, const Tensor& input) {
  gated("silu_and_mul", "result", Activation::kSilu, result, input, 0, 0);
}
void mul_and_silu(const Tensor& out, const Tensor& input) {
  gated("mul_and_silu", "out", Activation::kMulSilu, out, input, 0, 0);
}
void gelu_and_mul(const Tensor& out, const Tensor& input) {
  gated("gelu_and_mul", "out", Activation::kGelu, out, input, 0, 0);
}
void gelu_tanh_and_mul(const Tensor& out, const Tensor& input) {
  gated("gelu_tanh_and_mul", "out", Activation::kGeluTanh, out, input, 0, 0);
}
void fatrelu_and_mul(const Tensor& out, const Tensor& input, double threshold) {
  gated("fatrelu_and_mul", "out", Activation::kFatRelu, out, input, threshold, 0);
}
void swigluoai_and_mul(const Tensor& out, const Tensor& input, double alpha, double limit) {
  gated("swigluoai_and_mul", "out", Activation::kSwigluOai, out, input, alpha, limit);
}

}  // namespace
}  // namespace kvcache_glue
