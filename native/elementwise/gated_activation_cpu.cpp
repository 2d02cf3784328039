// Gated activations on the CPU.
#include <algorithm>
#include <cstdint>

#include "elementwise/elementwise.h"
#include "prim/cpu_lanes.h"
#include "prim/cpu_parallel.h"

namespace elementwise {
namespace {

#define LANES_KERNEL "elementwise/gated_activation_lanes.h"
#include "prim/cpu_each_isa.h"

template <Activation kAct, cpu::Stores kStores, class T>
void run_storing(const ActivationArgs& a) {
  // Cut rows too, so that one long row still uses every thread.
  constexpr int64_t kChunk = 2048;
  const int64_t chunks = (a.d + kChunk - 1) / kChunk;
  const auto activate_run = PICK_ISA(activate_run<kAct, kStores, T>);
  const int64_t cost = 3 * sizeof(T) * std::min(a.d, kChunk);
  cpu::parallel_spans(a.rows * chunks, cost, [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const int64_t row = task / chunks, first = task % chunks * kChunk;
      const int64_t n = std::min(kChunk, a.d - first);
      const T* in = static_cast<const T*>(a.input) + row * 2 * a.d;
      T* out = static_cast<T*>(a.out) + row * a.d + first;
      if constexpr (kAct == Activation::kSwigluOai) {
        activate_run(out, in + 2 * first, nullptr, n, a.alpha, a.limit);
      } else {
        activate_run(out, in + first, in + a.d + first, n, a.alpha, a.limit);
      }
    }
    if constexpr (kStores == cpu::Stores::kStreamed) cpu::finish_streaming();
  });
}

template <Activation kAct, class T>
void run(const ActivationArgs& a) {
  const int64_t row = a.d * static_cast<int64_t>(sizeof(T));
  const bool streams = cpu::beyond_caches(3 * a.rows * row) && cpu::on_lines(a.out, {row});
  if (streams) return run_storing<kAct, cpu::Stores::kStreamed, T>(a);
  return run_storing<kAct, cpu::Stores::kCached, T>(a);
}

template <Activation kAct>
void by_dtype(const ActivationArgs& a) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run<kAct, float>(a);
    case DType::kFloat16:
      return run<kAct, cpu::Half>(a);
    default:
      return run<kAct, cpu::BFloat16>(a);
  }
}

}  // namespace

void gated_activation(const ActivationArgs& a, Stream /*stream*/) {
  switch (a.activation) {
    case Activation::kSilu:
      return by_dtype<Activation::kSilu>(a);
    case Activation::kMulSilu:
      return by_dtype<Activation::kMulSilu>(a);
    case Activation::kGelu:
      return by_dtype<Activation::kGelu>(a);
    case Activation::kGeluTanh:
      return by_dtype<Activation::kGeluTanh>(a);
    case Activation::kFatRelu:
      return by_dtype<Activation::kFatRelu>(a);
    case Activation::kSwigluOai:
      return by_dtype<Activation::kSwigluOai>(a);
  }
}

}  // namespace elementwise
