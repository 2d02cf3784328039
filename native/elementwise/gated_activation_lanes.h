// Gated activations of one run of a row, for one instruction set (see prim/cpu_lanes.h).

// 1 / (1 + e^-x). The exponent is cut where the result is about 1e-38.
template <bool kShort>
LANES Floats sigmoid(Floats x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  return reciprocal(1.0f + exp<kShort>(-x));
}

// 0.5 erfc(z) for 0 <= z <= 15, as t e^(Q(t) - z^2) with t = 1 / (1 + c z). Q of degree 9 is that
// of W. Press et al., Numerical Recipes, erfcc (relative error 1.2e-7); the short one of degree 6
// is ours (1.2e-5).
template <bool kShort>
LANES Floats half_erfc(Floats z) {
  Floats t, q;
  if constexpr (kShort) {
    t = reciprocal(z * 0.7f + 1.0f);
    q = t * -0.250463808f + 0.859921519f;
    q = q * t - 0.903780802f;
    q = q * t - 0.0171336662f;
    q = q * t + 0.239937665f;
    q = q * t + 1.00054992f;
    q = q * t - 0.9290425f;
  } else {
    t = reciprocal(z * 0.5f + 1.0f);
    q = t * 0.17087277f - 0.82215223f;
    q = q * t + 1.48851587f;
    q = q * t - 1.13520398f;
    q = q * t + 0.27886807f;
    q = q * t - 0.18628806f;
    q = q * t + 0.09678418f;
    q = q * t + 0.37409196f;
    q = q * t + 1.00002368f;
    q = q * t - 1.26551223f;
  }
  return 0.5f * t * exp<kShort>(q - z * z);
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|): the tail comes from erfc, so that large negative x keep
// their relative accuracy.
template <bool kShort>
LANES Floats gelu(Floats x) {
  Floats size = magnitude(x);
  size = size > 20.0f ? splat(20.0f) : size;  // where the tail is 0 already
  return (x < 0.0f ? Floats{} : x) - size * half_erfc<kShort>(size * 0.70710678f);
}

// 0.5 x (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).
template <bool kShort>
LANES Floats gelu_tanh(Floats x) {
  return x * sigmoid<kShort>(x * (x * x * 0.0713548162726f + 1.59576912f));
}

template <Activation kAct, bool kShort>
LANES Floats activate(Floats x) {
  if constexpr (kAct == Activation::kGelu) return gelu<kShort>(x);
  if constexpr (kAct == Activation::kGeluTanh) return gelu_tanh<kShort>(x);
  return x * sigmoid<kShort>(x);
}

template <Activation kAct, class T>
LANES Floats gated(Floats x, Floats y, float alpha, float limit) {
  constexpr bool kShort = sizeof(T) == 2;
  if constexpr (kAct == Activation::kSwigluOai) {
    x = x > limit ? splat(limit) : x;
    y = y > limit ? splat(limit) : y;
    y = y < -limit ? splat(-limit) : y;
    return (y + 1.0f) * x * sigmoid<kShort>(alpha * x);
  }
  if constexpr (kAct == Activation::kFatRelu) return (x > alpha ? x : Floats{}) * y;
  if constexpr (kAct == Activation::kMulSilu) return x * rounded_to<T>(activate<kAct, kShort>(y));
  return rounded_to<T>(activate<kAct, kShort>(x)) * y;
}

// Outputs of two halves of a row, 2 * kWidth of each.
template <Activation kAct, class T>
LANES void halves(T* out, const T* x, const T* y, float alpha, float limit) {
  const Pair a = load_pair(x), b = load_pair(y);
  store_pair(out,
             Pair{gated<kAct, T>(a.a, b.a, alpha, limit), gated<kAct, T>(a.b, b.b, alpha, limit)});
}

// Outputs of kWidth pairs.
template <Activation kAct, class T>
LANES void interleaved(T* out, const T* pairs, float alpha, float limit) {
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {
    const Pair split = load_pair(pairs);  // by even and odd places
    store(out, gated<kAct, T>(split.a, split.b, alpha, limit));
  } else {
    const Floats a = load(pairs), b = load(pairs + kWidth);
    const Ints even = 2 * places();
    const Floats x = __builtin_shuffle(a, b, even), y = __builtin_shuffle(a, b, even + 1);
    store(out, gated<kAct, T>(x, y, alpha, limit));
  }
}

// n outputs of one row. x and y point at the first element of each half; for kSwigluOai x points at
// the pairs.
template <Activation kAct, class T>
void activate_run(T* out, const T* x, const T* y, int64_t n, float alpha, float limit) {
  constexpr bool kPairs = kAct == Activation::kSwigluOai;
  constexpr int64_t kStep = kPairs ? kWidth : 2 * kWidth;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if constexpr (kPairs) {
      interleaved<kAct>(out + i, x + 2 * i, alpha, limit);
    } else {
      // Three streams that start anew every few KB: the processor alone sees them too late.
      prefetch(x + i);
      prefetch(y + i);
      prefetch(out + i);
      halves<kAct>(out + i, x + i, y + i, alpha, limit);
    }
  }
  if (i == n) return;
  // What is left goes through buffers of whole vectors.
  T in[4 * kWidth] = {}, result[2 * kWidth];
  if constexpr (kPairs) {
    std::memcpy(in, x + 2 * i, 2 * (n - i) * sizeof(T));
    interleaved<kAct>(result, in, alpha, limit);
  } else {
    std::memcpy(in, x + i, (n - i) * sizeof(T));
    std::memcpy(in + 2 * kWidth, y + i, (n - i) * sizeof(T));
    halves<kAct>(result, in, in + 2 * kWidth, alpha, limit);
  }
  std::memcpy(out + i, result, (n - i) * sizeof(T));
}
