// One row of the norms, for one instruction set (see prim/cpu_lanes.h). The squares are summed in
// 32 fixed lanes, the same whatever the batch, the thread or the instruction set.

constexpr int64_t kLanes = 32;
constexpr int kPairs = kLanes / (2 * kWidth);

struct Sum {
  Pair lanes[kPairs] = {};
};

LANES void add_squares(Pair* sum, Pair x) {
  sum->a += x.a * x.a;
  sum->b += x.b * x.b;
}

// The lanes in the order in which load_pair found them, folded in halves.
template <class T>
LANES float total(const Sum& sum) {
  float lane[kLanes];
  for (int p = 0; p < kPairs; ++p) {
    float* at = lane + 2 * kWidth * p;
    for (int j = 0; j < kWidth; ++j) {
      constexpr bool kAlternate = std::is_same_v<T, cpu::BFloat16>;
      at[kAlternate ? 2 * j : j] = sum.lanes[p].a[j];
      at[kAlternate ? 2 * j + 1 : kWidth + j] = sum.lanes[p].b[j];
    }
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

template <class T>
LANES float inverse_rms(const Sum& sum, int64_t n, float epsilon) {
  return 1.0f / std::sqrt(total<T>(sum) / static_cast<float>(n) + epsilon);
}

template <cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES void scale_pair(T* out, const T* x, const T* weight, Floats factor) {
  Pair v = load_pair(x);
  v.a *= factor, v.b *= factor;
  if (weight != nullptr) {
    const Pair w = load_pair(weight);
    v.a *= w.a, v.b *= w.b;
  }
  store_pair<false, kStores>(out, v);
}

// Prefetches the row that is read next while this one is written, if the first cache has room for
// it: for two of 8 KB that are written where they were read, or for any that is streamed.
template <cpu::Stores kStores, class T>
LANES void scale_row(T* out, const T* x, const T* weight, int64_t n, float by, const T* next) {
  constexpr bool kStreamed = kStores == cpu::Stores::kStreamed;
  const bool ahead = kStreamed || n * sizeof(T) <= 8192;
  const Floats factor = splat(by);
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    for (int64_t j = i; ahead && j < i + 2 * kWidth; j += cpu::kLine / sizeof(T)) {
      __builtin_prefetch(next + j, 0, kStreamed ? 0 : 3);
    }
    scale_pair<kStores>(out + i, x + i, weight == nullptr ? nullptr : weight + i, factor);
  }
  if (i == n) return;
  T in[2 * kWidth] = {}, w[2 * kWidth] = {}, result[2 * kWidth];
  std::memcpy(in, x + i, (n - i) * sizeof(T));
  if (weight != nullptr) std::memcpy(w, weight + i, (n - i) * sizeof(T));
  scale_pair(result, in, weight == nullptr ? nullptr : w, factor);
  std::memcpy(out + i, result, (n - i) * sizeof(T));
}

template <cpu::Stores kStores, class T>
void norm_row(T* out, const T* x, const T* weight, int64_t n, float epsilon, const T* next) {
  Sum sum;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int p = 0; p < kPairs; ++p) add_squares(sum.lanes + p, load_pair(x + i + 2 * kWidth * p));
  }
  if (i < n) {
    T rest[kLanes] = {};
    std::memcpy(rest, x + i, (n - i) * sizeof(T));
    for (int p = 0; p < kPairs; ++p) add_squares(sum.lanes + p, load_pair(rest + 2 * kWidth * p));
  }
  scale_row<kStores>(out, x, weight, n, inverse_rms<T>(sum, n, epsilon), next);
}

// residual = round(x + residual), whose squares go to the sum.
template <class T>
LANES void add_pair(Pair* sum, T* residual, const T* x) {
  const Pair a = load_pair(x), b = load_pair(residual);
  const Pair z = {rounded_to<T>(a.a + b.a), rounded_to<T>(a.b + b.b)};
  store_pair<false>(residual, z);
  add_squares(sum, z);
}

template <class T>
void add_norm_row(T* x, T* residual, const T* weight, int64_t n, float epsilon, const T* next) {
  Sum sum;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int p = 0; p < kPairs; ++p) {
      const int64_t at = i + 2 * kWidth * p;
      add_pair(sum.lanes + p, residual + at, x + at);
    }
  }
  if (i < n) {
    T a[kLanes] = {}, b[kLanes] = {};
    std::memcpy(a, x + i, (n - i) * sizeof(T));
    std::memcpy(b, residual + i, (n - i) * sizeof(T));
    for (int p = 0; p < kPairs; ++p) {
      add_pair(sum.lanes + p, b + 2 * kWidth * p, a + 2 * kWidth * p);
    }
    std::memcpy(residual + i, b, (n - i) * sizeof(T));
  }
  scale_row<cpu::Stores::kCached>(x, residual, weight, n, inverse_rms<T>(sum, n, epsilon), next);
}
