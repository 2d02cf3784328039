// Some vectors that go through the same steps side by side, for the instruction set LANES_ISA.
// Included by cpu_lanes_of_isa.h; no include guard.
//
// A step waits for the one before it, a few cycles each. In a group the next instruction belongs to
// another vector and need not wait; written one after the other, the steps of one vector fill what
// the processor looks ahead.
template <int kCount>
struct Group {
  Floats v[kCount];
};

// What the steps of vector i take: a vector of another group, or what is the same for all.
template <int kCount>
LANES Floats for_vector(int i, const Group<kCount>& x) {
  return x.v[i];
}
template <class Scalar>
LANES Scalar for_vector(int /*i*/, Scalar x) {
  return x;
}

// A function of one vector and perhaps more, for groups.
#define OF_EACH(f)                                                               \
  template <int kCount, class... More>                                           \
  LANES Group<kCount> f(const Group<kCount>& x, More... more) {                  \
    Group<kCount> y;                                                             \
    for (int i = 0; i < kCount; ++i) y.v[i] = f(x.v[i], for_vector(i, more)...); \
    return y;                                                                    \
  }
OF_EACH(at_least)
OF_EACH(at_most)
OF_EACH(if_above)
OF_EACH(magnitude_at_most)

#define OPERATOR_OF_EACH(op)                                              \
  template <int kCount, class Y>                                          \
  LANES Group<kCount> operator op(const Group<kCount>& x, const Y& y) {   \
    Group<kCount> z;                                                      \
    for (int i = 0; i < kCount; ++i) z.v[i] = x.v[i] op for_vector(i, y); \
    return z;                                                             \
  }                                                                       \
  template <int kCount>                                                   \
  LANES Group<kCount> operator op(float x, const Group<kCount>& y) {      \
    Group<kCount> z;                                                      \
    for (int i = 0; i < kCount; ++i) z.v[i] = x op y.v[i];                \
    return z;                                                             \
  }
OPERATOR_OF_EACH(+)
OPERATOR_OF_EACH(-)
OPERATOR_OF_EACH(*)
OPERATOR_OF_EACH(/)

// kCount * kWidth items, in the order of load_pair.
template <int kCount, class T>
LANES Group<kCount> load_group(const T* at) {
  Group<kCount> x;
  for (int i = 0; i < kCount; i += 2) {
    const Pair pair = load_pair(at + i * kWidth);
    x.v[i] = pair.a, x.v[i + 1] = pair.b;
  }
  return x;
}
template <bool kAnyNan = true, cpu::Stores kStores = cpu::Stores::kCached, int kCount, class T>
LANES void store_group(T* at, const Group<kCount>& x) {
  for (int i = 0; i < kCount; i += 2) {
    store_pair<kAnyNan, kStores>(at + i * kWidth, Pair{x.v[i], x.v[i + 1]});
  }
}
