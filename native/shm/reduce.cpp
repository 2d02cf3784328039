#include "shm/reduce.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "prim/cpu_dispatch.h"
#include "prim/cpu_half.h"
#include "prim/cpu_vec.h"

namespace shm {
namespace {

using prim::BFloat16;
using prim::Float16;

// Elements summed at a time: their fp32 accumulators and one source stay in the L1 cache.
constexpr size_t kBlock = 1024;

// Integers are added as unsigned, where overflow wraps.
inline double to_acc(double x) { return x; }
inline uint8_t to_acc(uint8_t x) { return x; }
inline uint16_t to_acc(uint16_t x) { return x; }
inline uint32_t to_acc(uint32_t x) { return x; }
inline uint64_t to_acc(uint64_t x) { return x; }
inline float to_acc(float x) { return x; }
inline float to_acc(BFloat16 x) { return prim::to_float(x); }

template <typename T>
inline void from_acc(T x, T& out) {
  out = x;
}
inline void from_acc(float x, BFloat16& out) { prim::from_float(x, out); }

// The three loops a sum is made of: both ends of a chain of additions, and all of it for two
// sources. INDEPENDENT: `out` may be `a` or `b` itself, which is no dependence between iterations.
template <class T, class Acc>
VECTORISED void pair_loop(T* out, const T* a, const T* b, size_t n) {
  INDEPENDENT for (size_t i = 0; i < n; ++i) {
    from_acc(static_cast<Acc>(to_acc(a[i]) + to_acc(b[i])), out[i]);
  }
}
template <class T, class Acc>
VECTORISED void first_loop(Acc* acc, const T* a, const T* b, size_t n) {
  INDEPENDENT for (size_t i = 0; i < n; ++i) {
    acc[i] = static_cast<Acc>(to_acc(a[i]) + to_acc(b[i]));
  }
}
template <class T, class Acc>
VECTORISED void middle_loop(Acc* acc, const T* a, size_t n) {
  INDEPENDENT for (size_t i = 0; i < n; ++i) acc[i] = static_cast<Acc>(acc[i] + to_acc(a[i]));
}
template <class T, class Acc>
VECTORISED void last_loop(T* out, const Acc* acc, const T* a, size_t n) {
  INDEPENDENT for (size_t i = 0; i < n; ++i) {
    from_acc(static_cast<Acc>(acc[i] + to_acc(a[i])), out[i]);
  }
}

template <class T, class Acc = T>
struct Loops {
  using Element = T;
  using Accumulator = Acc;
  static void pair(T* out, const T* a, const T* b, size_t n) {
    cpu::vectorised<pair_loop<T, Acc>>(out, a, b, n);
  }
  static void first(Acc* acc, const T* a, const T* b, size_t n) {
    cpu::vectorised<first_loop<T, Acc>>(acc, a, b, n);
  }
  static void middle(Acc* acc, const T* a, size_t n) {
    cpu::vectorised<middle_loop<T, Acc>>(acc, a, n);
  }
  static void last(T* out, const Acc* acc, const T* a, size_t n) {
    cpu::vectorised<last_loop<T, Acc>>(out, acc, a, n);
  }
};

// fp16 has instructions for arrays, not loops that the compiler would turn into them.
struct LoopsOfHalf {
  using Element = Float16;
  using Accumulator = float;
  static void first(float* acc, const Float16* a, const Float16* b, size_t n) {
    prim::to_float(a, acc, n);
    middle(acc, b, n);
  }
  static void middle(float* acc, const Float16* a, size_t n) {
    float wide[kBlock];
    prim::to_float(a, wide, n);
    Loops<float>::middle(acc, wide, n);
  }
  static void last(Float16* out, const float* acc, const Float16* a, size_t n) {
    float wide[kBlock];
    prim::to_float(a, wide, n);
    Loops<float>::pair(wide, acc, wide, n);
    prim::from_float(wide, out, n);
  }
  static void pair(Float16* out, const Float16* a, const Float16* b, size_t n) {
    float acc[kBlock];
    prim::to_float(a, acc, n);
    last(out, acc, b, n);
  }
};

template <typename Loops>
void sum_of(void* out, void* copy, const void* const* sources, int count, size_t elements) {
  using T = typename Loops::Element;
  alignas(64) typename Loops::Accumulator acc[kBlock];
  for (size_t start = 0; start < elements; start += kBlock) {
    const size_t n = std::min(kBlock, elements - start);
    const auto source = [&](int i) { return static_cast<const T*>(sources[i]) + start; };
    T* block = static_cast<T*>(out) + start;
    if (count == 2) {
      Loops::pair(block, source(0), source(1), n);
    } else {
      Loops::first(acc, source(0), source(1), n);
      for (int i = 2; i < count - 1; ++i) Loops::middle(acc, source(i), n);
      Loops::last(block, acc, source(count - 1), n);
    }
    if (copy != nullptr) std::memcpy(static_cast<T*>(copy) + start, block, n * sizeof(T));
  }
}

}  // namespace

size_t sum_element_size(DType dtype) {
  switch (dtype) {
    case DType::kU8:
    case DType::kI8:
      return 1;
    case DType::kI16:
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kI32:
    case DType::kF32:
      return 4;
    case DType::kI64:
    case DType::kF64:
      return 8;
  }
  return 0;
}

void sum(DType dtype, void* out, void* copy, const void* const* sources, int count,
         size_t elements) {
  switch (dtype) {
    case DType::kU8:
    case DType::kI8:
      return sum_of<Loops<uint8_t>>(out, copy, sources, count, elements);
    case DType::kI16:
      return sum_of<Loops<uint16_t>>(out, copy, sources, count, elements);
    case DType::kI32:
      return sum_of<Loops<uint32_t>>(out, copy, sources, count, elements);
    case DType::kI64:
      return sum_of<Loops<uint64_t>>(out, copy, sources, count, elements);
    case DType::kF16:
      return sum_of<LoopsOfHalf>(out, copy, sources, count, elements);
    case DType::kBF16:
      return sum_of<Loops<BFloat16, float>>(out, copy, sources, count, elements);
    case DType::kF32:
      return sum_of<Loops<float>>(out, copy, sources, count, elements);
    case DType::kF64:
      return sum_of<Loops<double>>(out, copy, sources, count, elements);
  }
}

}  // namespace shm
