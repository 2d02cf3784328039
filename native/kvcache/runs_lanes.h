// Runs of elements quantized and dequantized, for one instruction set (see prim/cpu_lanes.h).

// A copy in stores of whole vectors at their own alignment: with 64 bytes a whole cache line each,
// which need not be read first. What lies behind the run, often the next, is prefetched meanwhile.
inline void copy_run(char* out, const char* in, int64_t bytes) {
  constexpr int64_t kBytes = sizeof(Words);
  if (bytes < 4 * kBytes) {
    if (bytes > 0) std::memcpy(out, in, bytes);  // nothing may have no address
    return;
  }
  const Words first = load_as<Words>(in), last = load_as<Words>(in + bytes - kBytes);
  std::memcpy(out, &first, kBytes);
  int64_t i = kBytes - static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kBytes);
  for (; i + kBytes <= bytes; i += kBytes) {
    prefetch(in + i);
    const Words v = load_as<Words>(in + i);
    std::memcpy(__builtin_assume_aligned(out + i, kBytes), &v, kBytes);
  }
  std::memcpy(out + bytes - kBytes, &last, kBytes);
}

// Two copies line by line in turns, so that twice as many of their lines are on the way. Both
// outputs begin a cache line, and bytes is a multiple of one.
template <cpu::Stores kStores>
void copy_two_runs(char* out, const char* in, char* other_out, const char* other_in,
                   int64_t bytes) {
  constexpr int64_t kBytes = sizeof(Words);
  for (int64_t i = 0; i < bytes; i += kBytes) {
    if constexpr (kStores == cpu::Stores::kStreamed) {  // of cached data it only costs issue slots
      prefetch<kStores>(in + i);
      prefetch<kStores>(other_in + i);
    }
    put<kStores>(out + i, load_as<Words>(in + i));
    put<kStores>(other_out + i, load_as<Words>(other_in + i));
  }
}

// 2 * kWidth codes, in the low bytes of a pair, in the order of the items.
template <class T, cpu::Stores kStores>
LANES void store_code_pair(uint8_t* at, Words a, Words b) {
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // items at even and at odd places
    const Shorts both = narrow((a & 0xffu) | (b << 8 & 0xff00u));
    put<kStores>(at, both);
  } else {
    put<kStores>(at, narrow_to_bytes(a));
    put<kStores>(at + kWidth, narrow_to_bytes(b));
  }
}

#if LANES_ISA == 3
// The upper halves of the codes 0 to 127 as fp32, which is all of them: three mantissa bits.
template <cpu::Fp8 kFormat>
struct Decoded {
  alignas(64) uint16_t bits[128] = {};
  constexpr Decoded() {
    for (int code = 0; code < 128; ++code) {
      const auto value = cpu::from_fp8<kFormat>(static_cast<uint8_t>(code));
      bits[code] = static_cast<uint16_t>(cpu::bits_of(value) >> 16);
    }
  }
  __m512i quarter(int i) const { return _mm512_load_si512(bits + 32 * i); }
};
template <cpu::Fp8 kFormat>
constexpr Decoded<kFormat> decoded;

// 32 codes as bf16, looked up: two registers hold 64 entries, bit 6 tells which two.
template <cpu::Fp8 kFormat>
LANES __m512i decode(const uint8_t* at) {
  const Decoded<kFormat>& table = decoded<kFormat>;
  const __m512i codes = _mm512_cvtepu8_epi16(load_as<__m256i>(at));
  const __m512i low = _mm512_permutex2var_epi16(table.quarter(0), codes, table.quarter(1));
  const __m512i high = _mm512_permutex2var_epi16(table.quarter(2), codes, table.quarter(3));
  const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
  const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16(-0x8000));
  return _mm512_or_si512(_mm512_mask_blend_epi16(upper, low, high), sign);
}
#endif

// 2 * kWidth codes as the fp32 that load_pair would give for the items of T.
template <cpu::Fp8 kFormat, class T>
LANES Pair load_decoded_pair(const uint8_t* at) {
#if LANES_ISA == 3
  const __m512i items = decode<kFormat>(at);
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {
    return {(Floats)((Words)items << 16), (Floats)((Words)items & 0xffff0000u)};
  } else {
    return {(Floats)(widen((Shorts)_mm512_castsi512_si256(items)) << 16),
            (Floats)(widen((Shorts)_mm512_extracti64x4_epi64(items, 1)) << 16)};
  }
#else
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // items at even and at odd places
    const Words both = widen(load_as<Shorts>(at));
    return {from_fp8<kFormat>(both & 0xffu), from_fp8<kFormat>(both >> 8)};
  } else {
    return {from_fp8<kFormat>(load_codes(at)), from_fp8<kFormat>(load_codes(at + kWidth))};
  }
#endif
}

// How a scale is divided by.
enum class By {
  kPowerOfTwo,  // multiplied by its reciprocal: the same quotient, a good deal sooner
  kPositive,    // a quotient has the sign of its item
  kAny
};

LANES By by_of(float scale) {
  const uint32_t bits = cpu::bits_of(scale), exponent = bits >> 23;  // with the sign on top
  if (exponent <= 27 || exponent >= 227) return By::kAny;
  return (bits & 0x7fffffu) == 0 ? By::kPowerOfTwo : By::kPositive;
}

template <cpu::Fp8 kFormat, By kBy, cpu::Stores kStores, class T>
LANES void quantize_pair(uint8_t* out, const T* x, Floats scale) {
  const Pair v = load_pair(x);
  constexpr bool kTimes = kBy == By::kPowerOfTwo;
  const Floats a = kTimes ? v.a * scale : v.a / scale, b = kTimes ? v.b * scale : v.b / scale;
#if LANES_ISA == 3
  if constexpr (kBy != By::kAny && sizeof(T) == 2) {  // all signs at once
    const __m512i first = (__m512i)magnitude_to_fp8<kFormat>(a);
    const __m512i second = (__m512i)magnitude_to_fp8<kFormat>(b);
    __m512i codes;
    if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // of even places, of odd ones
      codes = _mm512_mask_blend_epi16(0x55555555u, _mm512_slli_epi32(second, 16), first);
    } else {
      const __m512i even = (__m512i)(places() * 0x40004 + 0x20000);
      codes = _mm512_permutex2var_epi16(first, even, second);
    }
    const __m512i signs = _mm512_srli_epi16(load_as<__m512i>(x), 8);
    const __m256i bytes = _mm512_cvtepi16_epi8(
        _mm512_ternarylogic_epi32(codes, signs, _mm512_set1_epi16(0x80), 0xf8));  // a | (b & c)
    return put<kStores>(out, bytes);
  }
#endif
  store_code_pair<T, kStores>(out, to_fp8<kFormat>(a), to_fp8<kFormat>(b));
}

// Returns how many items that was: all but what is left over of the last pair.
template <cpu::Fp8 kFormat, By kBy, cpu::Stores kStores, class T>
LANES int64_t quantize_pairs(uint8_t* out, const T* x, int64_t n, Floats scale) {
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    prefetch<kStores, 2 * kWidth>(x + i);
    quantize_pair<kFormat, kBy, kStores>(out + i, x + i, scale);
  }
  return i;
}

template <cpu::Fp8 kFormat, cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES int64_t quantize_pairs(uint8_t* out, const T* x, int64_t n, float scale) {
  switch (by_of(scale)) {
    case By::kPowerOfTwo:
      return quantize_pairs<kFormat, By::kPowerOfTwo, kStores>(out, x, n, splat(1.0f / scale));
    case By::kPositive:
      return quantize_pairs<kFormat, By::kPositive, kStores>(out, x, n, splat(scale));
    default:
      return quantize_pairs<kFormat, By::kAny, kStores>(out, x, n, splat(scale));
  }
}

template <cpu::Fp8 kFormat, cpu::Stores kStores, class T>
void quantize_run(uint8_t* out, const T* x, int64_t n, float scale) {
  const int64_t i = quantize_pairs<kFormat, kStores>(out, x, n, scale);
  if (i == n) return;
  T in[2 * kWidth] = {};
  uint8_t codes[2 * kWidth];
  std::memcpy(in, x + i, (n - i) * sizeof(T));
  quantize_pair<kFormat, By::kAny, cpu::Stores::kCached>(codes, in, splat(scale));
  std::memcpy(out + i, codes, n - i);
}

template <cpu::Fp8 kFormat, cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES void dequantize_pair(T* out, const uint8_t* codes, Floats scale) {
  const Pair x = load_decoded_pair<kFormat, T>(codes);
  store_pair<false, kStores>(out, Pair{x.a * scale, x.b * scale});
}

template <cpu::Fp8 kFormat, cpu::Stores kStores, class T>
void dequantize_run(T* out, const uint8_t* codes, int64_t n, float scale) {
  const Floats s = splat(scale == scale ? scale : NAN);  // a NaN that store_pair<false> takes
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    dequantize_pair<kFormat, kStores>(out + i, codes + i, s);
  }
  if (i == n) return;
  uint8_t in[2 * kWidth] = {};
  T result[2 * kWidth];
  std::memcpy(in, codes + i, n - i);
  dequantize_pair<kFormat>(result, in, s);
  std::memcpy(out + i, result, (n - i) * sizeof(T));
}

// Largest magnitude; a NaN is passed over. n is a multiple of 32.
template <class T>
LANES float largest_magnitude(const T* x, int64_t n) {
  Floats a = {}, b = {};
  for (int64_t i = 0; i < n; i += 2 * kWidth) {
    const Pair v = load_pair(x + i);
    a = larger(magnitude(v.a), a);
    b = larger(magnitude(v.b), b);
  }
  return largest_of(larger(a, b));
}

// The scales that the largest magnitudes of groups of n items ask for.
template <class T>
void scales_of_groups(float* scales, const T* x, int64_t groups, int64_t n, GroupScale rule) {
  for (int64_t g = 0; g < groups; ++g) {
    prefetch(x + g * n);
    scales[g] = rule.of(largest_magnitude(x + g * n, n));
  }
}

// Groups of n items to e4m3 codes.
template <class T>
void quantize_groups(uint8_t* codes, const float* scales, const T* x, int64_t groups, int64_t n) {
  for (int64_t g = 0; g < groups; ++g) {
    quantize_pairs<cpu::Fp8::kE4M3>(codes + g * n, x + g * n, n, scales[g]);
  }
}
