// One head of one token merged, for one instruction set (see prim/cpu_lanes.h).

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
    prefetch(prefix + i);
    prefetch(suffix + i);
    store_pair<true, kStores>(out + i, weighted_pair(prefix + i, suffix + i, a, b));
  }
  if (i == n) return;
  T p[2 * kWidth] = {}, s[2 * kWidth] = {}, result[2 * kWidth];
  std::memcpy(p, prefix + i, (n - i) * sizeof(T));
  std::memcpy(s, suffix + i, (n - i) * sizeof(T));
  store_pair(result, weighted_pair(p, s, a, b));
  std::memcpy(out + i, result, (n - i) * sizeof(T));
}
