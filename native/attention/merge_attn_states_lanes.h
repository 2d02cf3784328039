// Heads of tokens merged, for one instruction set (see prim/cpu_lanes.h).

// log(1 + x) for 0 <= x <= 1, with a relative error of 2e-7.
LANES Floats log_of_one_and(Floats x) {
  return x * polynomial(x, 0.00523262518f, -0.0295049623f, 0.0782255083f, -0.136632085f,
                        0.191059887f, -0.248429775f, 0.333190978f, -0.499994934f, 0.99999994f);
}

// The log-sum-exps of two parts, where an infinite one means nothing, become the weights of the
// parts; lse becomes that of both, -inf (and the weights rubbish) where both are nothing.
inline void weigh(Heads& heads) {
  const Floats least = splat(-INFINITY);
  for (int64_t i = 0; i < kHeadsAtOnce; i += kWidth) {
    Floats p = load(heads.prefix + i), s = load(heads.suffix + i);
    p = p == -least ? least : p;
    s = s == -least ? least : s;
    const Floats top = p > s ? p : s, low = p > s ? s : p;
    const Floats lesser = exp<24>(at_least(low - top, -105.0f));  // e^0 of the other is 1
    const Floats larger = 1.0f / (1.0f + lesser), smaller = lesser / (1.0f + lesser);
    store(heads.prefix + i, p > s ? larger : smaller);
    store(heads.suffix + i, p > s ? smaller : larger);
    const Floats both = log_of_one_and(lesser) + top;
    store(heads.lse + i, top == least ? least : both);
  }
}

template <class T>
LANES Pair weighted_pair(const T* prefix, const T* suffix, float a, float b) {
  const Pair p = load_pair(prefix), s = load_pair(suffix);
  return {p.a * a + s.a * b, p.b * a + s.b * b};
}

// prefix a + suffix b. A row may be the output itself, element for element: what is stored has been
// loaded.
template <cpu::Stores kStores, class T>
void weighted(T* out, const T* prefix, const T* suffix, int64_t n, float a, float b) {
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    prefetch<kStores, 2 * kWidth>(prefix + i);
    prefetch<kStores, 2 * kWidth>(suffix + i);
    store_pair<true, kStores>(out + i, weighted_pair(prefix + i, suffix + i, a, b));
  }
  if (i == n) return;
  T p[2 * kWidth] = {}, s[2 * kWidth] = {}, result[2 * kWidth];
  std::memcpy(p, prefix + i, (n - i) * sizeof(T));
  std::memcpy(s, suffix + i, (n - i) * sizeof(T));
  store_pair(result, weighted_pair(p, s, a, b));
  std::memcpy(out + i, result, (n - i) * sizeof(T));
}
