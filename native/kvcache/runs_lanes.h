// Runs of elements quantized and dequantized, for one instruction set (see prim/cpu_lanes.h).

// 2 * kWidth codes out of a pair, in the order of the items.
template <class T>
LANES void store_code_pair(uint8_t* at, Words a, Words b) {
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // items at even and at odd places
    const Shorts both = narrow(a | b << 8);
    std::memcpy(at, &both, sizeof both);
  } else {
    store_codes(at, a);
    store_codes(at + kWidth, b);
  }
}

template <class T>
LANES void load_code_pair(const uint8_t* at, Words* a, Words* b) {
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {
    const Words both = widen(load_as<Shorts>(at));
    *a = both & 0xffu, *b = both >> 8;
  } else {
    *a = load_codes(at), *b = load_codes(at + kWidth);
  }
}

template <cpu::Fp8 kFormat, class T>
LANES void quantize_pair(uint8_t* out, const T* x, Floats scale) {
  const Pair v = load_pair(x);
  store_code_pair<T>(out, to_fp8<kFormat>(v.a / scale), to_fp8<kFormat>(v.b / scale));
}

template <cpu::Fp8 kFormat, class T>
void quantize_run(uint8_t* out, const T* x, int64_t n, float scale) {
  const Floats s = splat(scale);
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) quantize_pair<kFormat>(out + i, x + i, s);
  if (i == n) return;
  T in[2 * kWidth] = {};
  uint8_t codes[2 * kWidth];
  std::memcpy(in, x + i, (n - i) * sizeof(T));
  quantize_pair<kFormat>(codes, in, s);
  std::memcpy(out + i, codes, n - i);
}

template <cpu::Fp8 kFormat, class T>
LANES void dequantize_pair(T* out, const uint8_t* codes, Floats scale) {
  Words a, b;
  load_code_pair<T>(codes, &a, &b);
  store_pair(out, Pair{from_fp8<kFormat>(a) * scale, from_fp8<kFormat>(b) * scale});
}

template <cpu::Fp8 kFormat, class T>
void dequantize_run(T* out, const uint8_t* codes, int64_t n, float scale) {
  const Floats s = splat(scale);
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) dequantize_pair<kFormat>(out + i, codes + i, s);
  if (i == n) return;
  uint8_t in[2 * kWidth] = {};
  T result[2 * kWidth];
  std::memcpy(in, codes + i, n - i);
  dequantize_pair<kFormat>(result, in, s);
  std::memcpy(out + i, result, (n - i) * sizeof(T));
}

// Largest magnitude; a NaN is passed over (its bits lie above those of infinity). n is a multiple
// of 32.
template <class T>
float largest_magnitude(const T* x, int64_t n) {
  Words largest = {};
  for (int64_t i = 0; i < n; i += 2 * kWidth) {
    const Pair v = load_pair(x + i);
    for (const Floats half : {v.a, v.b}) {
      const Words u = (Words)half & 0x7fffffffu;
      const Words seen = u > 0x7f800000u ? Words{} : u;
      largest = seen > largest ? seen : largest;
    }
  }
  return cpu::float_of(largest_of(largest));
}
