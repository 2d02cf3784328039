// Loops that make one tensor of those of the ranks, in rank order; reduce.cpp picks them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "prim/cpu_dispatch.h"
#include "prim/cpu_half.h"
#include "prim/cpu_vec.h"

namespace shm {

using prim::BFloat16;
using prim::Float16;

// Elements reduced at a time: their accumulators and one source stay in the L1 cache.
inline constexpr size_t kBlock = 1024;

// How two accumulators become one, and what becomes of the last one of `count` ranks. Integers are
// added and multiplied as unsigned ones, which wrap.
struct Sum {
  template <class A>
  static A of(A a, A b) {
    return static_cast<A>(a + b);
  }
  template <class A>
  static A done(A a, int /*count*/) {
    return a;
  }
};
struct Average : Sum {
  template <class A>
  static A of(A a, A b) {
    if constexpr (std::is_floating_point_v<A>) {
      return a + b;
    } else {
      using Unsigned = std::make_unsigned_t<A>;
      return static_cast<A>(static_cast<Unsigned>(a) + static_cast<Unsigned>(b));
    }
  }
  template <class A>
  static A done(A a, int count) {
    return static_cast<A>(a / static_cast<A>(count));  // of integers: towards zero
  }
};
struct Product : Sum {
  template <class A>
  static A of(A a, A b) {
    using Wide = std::conditional_t<(sizeof(A) < 4), uint32_t, A>;  // 16 bits would become an int
    return static_cast<A>(static_cast<Wide>(a) * static_cast<Wide>(b));
  }
};
// A NaN of any rank is the result, as of torch.minimum and torch.maximum.
struct Min : Sum {
  template <class A>
  static A of(A a, A b) {
    return a < b || a != a ? a : b;
  }
};
struct Max : Sum {
  template <class A>
  static A of(A a, A b) {
    return a > b || a != a ? a : b;
  }
};
struct And : Sum {
  static uint8_t of(uint8_t a, uint8_t b) { return a & b; }
};
struct Or : Sum {
  static uint8_t of(uint8_t a, uint8_t b) { return a | b; }
};
struct Xor : Sum {
  static uint8_t of(uint8_t a, uint8_t b) { return a ^ b; }
};

template <class T>
inline T to_acc(T x) {
  return x;
}
inline float to_acc(BFloat16 x) { return prim::to_float(x); }

template <typename T>
inline void from_acc(T x, T& out) {
  out = x;
}
inline void from_acc(float x, BFloat16& out) { prim::from_float(x, out); }

// The three loops a reduction is made of: both ends of a chain, and all of it for two sources.
// INDEPENDENT: `out` may be `a` or `b` itself, which is no dependence between iterations.
template <class Op, class T, class Acc>
VECTORISED void pair_loop(T* out, const T* a, const T* b, size_t n) {
  INDEPENDENT for (size_t i = 0; i < n; ++i) {
    from_acc(Op::done(Op::of(Acc{to_acc(a[i])}, Acc{to_acc(b[i])}), 2), out[i]);
  }
}
template <class Op, class T, class Acc>
VECTORISED void first_loop(Acc* acc, const T* a, const T* b, size_t n) {
  INDEPENDENT for (size_t i = 0; i < n; ++i) acc[i] = Op::of(Acc{to_acc(a[i])}, Acc{to_acc(b[i])});
}
template <class Op, class T, class Acc>
VECTORISED void middle_loop(Acc* acc, const T* a, size_t n) {
  INDEPENDENT for (size_t i = 0; i < n; ++i) acc[i] = Op::of(acc[i], Acc{to_acc(a[i])});
}
template <class Op, class T, class Acc>
VECTORISED void last_loop(T* out, const Acc* acc, const T* a, size_t n, int count) {
  INDEPENDENT for (size_t i = 0; i < n; ++i) {
    from_acc(Op::done(Op::of(acc[i], Acc{to_acc(a[i])}), count), out[i]);
  }
}

template <class Op, class T, class Acc = T>
struct Loops {
  using Element = T;
  using Accumulator = Acc;
  static void pair(T* out, const T* a, const T* b, size_t n) {
    cpu::vectorised<pair_loop<Op, T, Acc>>(out, a, b, n);
  }
  static void first(Acc* acc, const T* a, const T* b, size_t n) {
    cpu::vectorised<first_loop<Op, T, Acc>>(acc, a, b, n);
  }
  static void middle(Acc* acc, const T* a, size_t n) {
    cpu::vectorised<middle_loop<Op, T, Acc>>(acc, a, n);
  }
  static void last(T* out, const Acc* acc, const T* a, size_t n, int count) {
    cpu::vectorised<last_loop<Op, T, Acc>>(out, acc, a, n, count);
  }
};

// fp16 has instructions for arrays, not loops that the compiler would turn into them.
template <class Op>
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
    Loops<Op, float>::middle(acc, wide, n);
  }
  static void last(Float16* out, const float* acc, const Float16* a, size_t n, int count) {
    float wide[kBlock];
    prim::to_float(a, wide, n);
    Loops<Op, float>::last(wide, acc, wide, n, count);
    prim::from_float(wide, out, n);
  }
  static void pair(Float16* out, const Float16* a, const Float16* b, size_t n) {
    float acc[kBlock];
    prim::to_float(a, acc, n);
    last(out, acc, b, n, 2);
  }
};

template <typename Loops>
void reduce_by(void* out, void* copy, const void* const* sources, int count, size_t elements) {
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
      Loops::last(block, acc, source(count - 1), n, count);
    }
    if (copy != nullptr) std::memcpy(static_cast<T*>(copy) + start, block, n * sizeof(T));
  }
}

}  // namespace shm
