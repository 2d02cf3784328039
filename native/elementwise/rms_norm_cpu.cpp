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

template <cpu::Stores kStores, class T>
void run_storing(const RmsNormArgs& a) {
  const auto norm_row = PICK_ISA(norm_row<kStores, T>);
  const auto row_at = [&](int64_t row) {
    const int64_t k = row % a.n2, j = row / a.n2 % a.n1, i = row / a.n2 / a.n1;
    return static_cast<const T*>(a.input) + i * a.stride0 + j * a.stride1 + k * a.stride2;
  };
  cpu::parallel_spans(a.n0 * a.n1 * a.n2, 2 * sizeof(T) * a.hidden, [&](int64_t row, int64_t end) {
    const T* x = row_at(row);
    for (; row < end; ++row) {
      const T* weight = static_cast<const T*>(a.weight);
      if (weight != nullptr) weight += row / a.n2 / a.n1 * a.weight_stride;
      const T* next = row + 1 < end ? row_at(row + 1) : x;
      norm_row(static_cast<T*>(a.out) + row * a.hidden, x, weight, a.hidden, a.epsilon, next);
      x = next;
    }
    if constexpr (kStores == cpu::Stores::kStreamed) cpu::finish_streaming();
  });
}

template <class T>
void run(const RmsNormArgs& a) {
  const int64_t row = a.hidden * static_cast<int64_t>(sizeof(T));
  const bool streams = a.out != a.input && cpu::beyond_caches(2 * a.n0 * a.n1 * a.n2 * row) &&
                       cpu::on_lines(a.out, {row});
  if (streams) return run_storing<cpu::Stores::kStreamed, T>(a);
  return run_storing<cpu::Stores::kCached, T>(a);
}

template <class T>
void run(const FusedAddRmsNormArgs& a) {
  const auto add_norm_row = PICK_ISA(add_norm_row<T>);
  cpu::parallel_for(a.n0 * a.n1 * a.n2, 4 * sizeof(T) * a.hidden, [&](int64_t row) {
    const int64_t k = row % a.n2, j = row / a.n2 % a.n1, i = row / a.n2 / a.n1;
    const T* weight = static_cast<const T*>(a.weight);
    if (weight != nullptr) weight += i * a.weight_stride;
    T* x =
        static_cast<T*>(a.input) + i * a.input_stride0 + j * a.input_stride1 + k * a.input_stride2;
    T* residual = static_cast<T*>(a.residual) + i * a.residual_stride0 + j * a.residual_stride1 +
                  k * a.residual_stride2;
    add_norm_row(x, residual, weight, a.hidden, a.epsilon, x + a.hidden);
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
