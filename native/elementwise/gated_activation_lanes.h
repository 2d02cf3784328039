// Gated activations of one run of a row, for one instruction set (see prim/cpu_lanes.h).

// x / (1 + e^-s): -0 where e^-s is infinite, NaN where x is as well.
template <int kBits, class V>
LANES V times_sigmoid(V x, V s) {
  if constexpr (kBits == 24) s = at_most(at_least(s, -105.0f), 105.0f);
  return x / (exp<kBits>(-1.0f * s) + 1.0f);
}

#if LANES_ISA == 3
// log2 of Phi(-z), cubics in z on [0, 1), [1, 2) ... [15, 16): relative errors of Phi up to 3.4e-5.
constexpr float kLogPhi[4][16] = {
    {-1.00004816f, -1.01882458f, -1.0926075f, -1.21420038f, -1.36014986f, -1.51323676f, -1.664168f,
     -1.80866206f, -1.94509673f, -2.07315731f, -2.19313478f, -2.30557299f, -2.41109705f,
     -2.51033115f, -2.60386133f, -2.6922226f},
    {-1.14953685f, -1.095227f, -0.983592689f, -0.860756218f, -0.750391424f, -0.657953978f,
     -0.582114637f, -0.519946277f, -0.468622208f, -0.425825298f, -0.389754951f, -0.359034598f,
     -0.332612872f, -0.30968228f, -0.289616883f, -0.271926671f},
    {-0.467212528f, -0.521833718f, -0.578748524f, -0.620308697f, -0.648200691f, -0.666837156f,
     -0.679554403f, -0.688477933f, -0.694917858f, -0.699687779f, -0.703304052f, -0.706102788f,
     -0.708308637f, -0.710075319f, -0.711510539f, -0.712691307f},
    {-0.0392834209f, -0.0201743376f, -0.0104009127f, -0.0056923274f, -0.00333661702f,
     -0.00208211294f, -0.00137046445f, -0.000943148334f, -0.000673624745f, -0.000496323919f,
     -0.000375422766f, -0.00029039997f, -0.000228996738f, -0.000183614888f, -0.00014938922f,
     -0.000123113656f}};

LANES Floats of_segment(Floats segment, int power) { return entries_of(kLogPhi[power], segment); }
OF_EACH(of_segment)
#endif

// Phi(-z), the tail of the normal distribution, for 0 <= z <= 15.9: for fewer than 24 bits from the
// table above where a vector holds one, else as t e^(Q(t) - z^2 / 2) with t = 1 / (1 + c z). Q of
// degree 9 is that of W. Press et al., Numerical Recipes, erfcc (relative error 1.2e-7), evaluated
// in thirds that do not wait for each other; the short one of degree 6 is ours (1.2e-5).
template <int kBits, class V>
LANES V normal_tail(V z) {
#if LANES_ISA == 3
  if constexpr (kBits < 24) {
    const V segment = entry_numbers(z);
    V p = of_segment(segment, 3) * z + of_segment(segment, 2);
    p = p * z + of_segment(segment, 1);
    return exp2_of<kBits>(p * z + of_segment(segment, 0));
  }
#endif
  const V x = z * 0.70710678f;  // 0.5 erfc(x)
  V t, q;
  if constexpr (kBits < 24) {
    t = 1.0f / (x * 0.7f + 1.0f);
    q = polynomial(t, -0.250463808f, 0.859921519f, -0.903780802f, -0.0171336662f, 0.239937665f,
                   1.00054992f, -0.9290425f);
  } else {
    t = 1.0f / (x * 0.5f + 1.0f);
    const V t2 = t * t, t3 = t2 * t;
    const V high = t3 * 0.17087277f + (t2 * -0.82215223f + (t * 1.48851587f - 1.13520398f));
    const V middle = t2 * 0.27886807f + (t * -0.18628806f + 0.09678418f);
    const V low = t2 * 0.37409196f + (t * 1.00002368f - 1.26551223f);
    q = (high * t3 + middle) * t3 + low;
  }
  return 0.5f * t * exp<kBits>(q - x * x);
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|): from the tail, so that large negative x keep their relative
// accuracy.
template <int kBits, class V>
LANES V gelu(V x) {
  const V size = magnitude_at_most(x, 15.9f);  // where the tail is 0 already
  return at_least(x, 0.0f) - size * normal_tail<kBits>(size);
}

// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
template <int kBits, class V>
LANES V gelu_tanh(V x) {
  if constexpr (kBits < 24) {  // the exponent in base 2
    return x / (exp2_of<kBits>(x * (x * x * -0.102943239f + -2.302208198f)) + 1.0f);
  }
  return times_sigmoid<kBits>(x, x * (x * x * 0.0713548162726f + 1.59576912f));
}

template <Activation kAct, int kBits, class V>
LANES V activate(V x) {
  if constexpr (kAct == Activation::kGelu) return gelu<kBits>(x);
  if constexpr (kAct == Activation::kGeluTanh) return gelu_tanh<kBits>(x);
  return times_sigmoid<kBits>(x, x);
}

// x as T would hold it, but that a tie of bf16 goes away from zero: x comes out of an approximation
// that errs by more, so that no tie is one.
template <class T>
LANES Floats about_rounded_to(Floats x) {
  if constexpr (!std::is_same_v<T, cpu::BFloat16>) return rounded_to<T>(x);
  return (Floats)(((Words)x + 0x8000u) & 0xffff0000u);
}
template <class T, int kCount>
LANES Group<kCount> about_rounded_to(Group<kCount> x) {
  for (Floats& v : x.v) v = about_rounded_to<T>(v);
  return x;
}

template <Activation kAct, class T, class V>
LANES V gated(V x, V y, float alpha, float limit) {
  constexpr int kBits = kBitsOf<T>;
  if constexpr (kAct == Activation::kSwigluOai) {
    x = at_most(x, limit);
    y = at_least(at_most(y, limit), -limit);
    return (y + 1.0f) * times_sigmoid<kBits>(x, alpha * x);
  }
  if constexpr (kAct == Activation::kFatRelu) return if_above(x, alpha) * y;
  if constexpr (kAct == Activation::kMulSilu) {
    return x * about_rounded_to<T>(activate<kAct, kBits>(y));
  }
  return about_rounded_to<T>(activate<kAct, kBits>(x)) * y;
}

constexpr int kCount = LANES_ISA == 3 ? 4 : 2;  // vectors of a group: as many as registers allow
constexpr int64_t kStep = kCount * kWidth;

// kStep outputs of two halves of a row.
template <Activation kAct, cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES void halves(T* out, const T* x, const T* y, float alpha, float limit) {
  const Group<kCount> a = load_group<kCount>(x), b = load_group<kCount>(y);
  store_group<false, kStores>(out, gated<kAct, T>(a, b, alpha, limit));
}

// kStep outputs of as many pairs.
template <Activation kAct, cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES void interleaved(T* out, const T* pairs, float alpha, float limit) {
  Group<kCount> x, y;
  for (int i = 0; i < kCount; ++i, pairs += 2 * kWidth) {
    if constexpr (std::is_same_v<T, cpu::BFloat16>) {
      const Pair split = load_pair(pairs);  // of even and odd items
      x.v[i] = split.a, y.v[i] = split.b;
    } else {
      const Floats a = load(pairs), b = load(pairs + kWidth);
      x.v[i] = even_items(a, b, kAll), y.v[i] = odd_items(a, b, kAll);
    }
  }
  x = gated<kAct, T>(x, y, alpha, limit);
  for (int i = 0; i < kCount; i += 2) store_two<kStores>(out + i * kWidth, x.v[i], x.v[i + 1]);
}

// n outputs of one row. x and y point at the first element of each half; for kSwigluOai x points at
// the pairs.
template <Activation kAct, cpu::Stores kStores, class T>
void activate_run(T* out, const T* x, const T* y, int64_t n, float alpha, float limit) {
  constexpr bool kPairs = kAct == Activation::kSwigluOai;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    // Streams that start anew every few KB: the processor alone sees them too late.
    if constexpr (kStores == cpu::Stores::kCached) prefetch<kStores, kStep>(out + i);
    if constexpr (kPairs) {
      prefetch<kStores, 2 * kStep>(x + 2 * i);
      interleaved<kAct, kStores>(out + i, x + 2 * i, alpha, limit);
    } else {
      prefetch<kStores, kStep>(x + i);
      prefetch<kStores, kStep>(y + i);
      halves<kAct, kStores>(out + i, x + i, y + i, alpha, limit);
    }
  }
  if (i == n) return;
  // What is left goes through buffers of whole vectors.
  T in[2 * kStep] = {}, result[kStep];
  if constexpr (kPairs) {
    std::memcpy(in, x + 2 * i, 2 * (n - i) * sizeof(T));
    interleaved<kAct>(result, in, alpha, limit);
  } else {
    std::memcpy(in, x + i, (n - i) * sizeof(T));
    std::memcpy(in + kStep, y + i, (n - i) * sizeof(T));
    halves<kAct>(result, in, in + kStep, alpha, limit);
  }
  std::memcpy(out + i, result, (n - i) * sizeof(T));
}
