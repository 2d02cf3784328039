// A tensor's dtype. Tensor::scalar_type() throws for those that torch's stable interface does not
// name (quint8, bits8, ...).
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "torch/errors.h"

namespace torch_glue {

using torch::headeronly::ScalarType;

// ScalarType::Undefined for a dtype without a name.
inline ScalarType dtype_of(const torch::stable::Tensor& tensor) {
  constexpr ScalarType kNamed[] = {ScalarType::Float,
                                   ScalarType::BFloat16,
                                   ScalarType::Half,
                                   ScalarType::Byte,
                                   ScalarType::Long,
                                   ScalarType::Int,
                                   ScalarType::Short,
                                   ScalarType::Char,
                                   ScalarType::Bool,
                                   ScalarType::Double,
                                   ScalarType::Float8_e4m3fn,
                                   ScalarType::Float8_e5m2,
                                   ScalarType::ComplexFloat,
                                   ScalarType::ComplexDouble,
                                   ScalarType::ComplexHalf,
                                   ScalarType::UInt16,
                                   ScalarType::UInt32,
                                   ScalarType::UInt64,
                                   ScalarType::Float8_e5m2fnuz,
                                   ScalarType::Float8_e4m3fnuz,
                                   ScalarType::Float8_e8m0fnu,
                                   ScalarType::Float4_e2m1fn_x2};
  int32_t number = 0;
  check(aoti_torch_get_dtype(tensor.get(), &number) == 0, "torch does not tell a tensor's dtype");
  for (const ScalarType named : kNamed) {
    const auto same = torch::stable::detail::to<int32_t>(torch::stable::detail::from(named));
    if (same == number) return named;
  }
  return ScalarType::Undefined;
}

}  // namespace torch_glue
