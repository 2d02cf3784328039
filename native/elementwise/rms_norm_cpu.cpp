// RMSNorm on the CPU: a task is a row.
#include <cmath>
#include <cstdint>

#include "elementwise/elementwise.h"
#include "prim/cpu_lanes.h"
#include "prim/cpu_parallel.h"

namespace elementwise {
namespace {

#define LANES_KERNEL "elementwise/rms_norm_lanes.h"
#include "prim/cpu_each_isa.h"

template <class T>
void run(const RmsNormArgs& a) {
  const auto norm_row = PICK_ISA(norm_row<T>);
  cpu::parallel_for(a.n0 * a.n1 * a.n2, 2 * sizeof(T) * a.hidden, [&](int64_t row) {
    const int64_t k = row % a.n2, j = row / a.n2 % a.n1, i = row / a.n2 / a.n1;
    const T* weight = static_cast<const T*>(a.weight);
    if (weight != nullptr) weight += i * a.weight_stride;
    norm_row(static_cast<T*>(a.out) + row * a.hidden,
             static_cast<const T*>(a.input) + i * a.stride0 + j * a.stride1 + k * a.stride2, weight,
             a.hidden, a.epsilon);
  });
}

template <class T>
void run(const FusedAddRmsNormArgs& a) {
  const auto add_norm_row = PICK_ISA(add_norm_row<T>);
  cpu::parallel_for(a.n0 * a.n1 * a.n2, 4 * sizeof(T) * a.hidden, [&](int64_t row) {
    const int64_t k = row % a.n2, j = row / a.n2 % a.n1, i = row / a.n2 / a.n1;
    const T* weight = static_cast<const T*>(a.weight);
    if (weight != nullptr) weight += i * a.weight_stride;
    add_norm_row(
        static_cast<T*>(a.input) + i * a.input_stride0 + j * a.input_stride1 + k * a.input_stride2,
        static_cast<T*>(a.residual) + i * a.residual_stride0 + j * a.residual_stride1 +
            k * a.residual_stride2,
        weight, a.hidden, a.epsilon);
  });
}

template <class Args>
void by_dtype(const Args& a) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run<float>(a);
    case DType::kFloat16:
      return run<cpu::Half>(a);
    default:
      return run<cpu::BFloat16>(a);
  }
}

}  // namespace

void rms_norm(const RmsNormArgs& args, Stream /*stream*/) { by_dtype(args); }
void fused_add_rms_norm(const FusedAddRmsNormArgs& args, Stream /*stream*/) { by_dtype(args); }

}  // namespace elementwise
