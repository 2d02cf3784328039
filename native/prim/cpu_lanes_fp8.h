// Pairs of vectors to fp8 values and back, for the instruction set LANES_ISA; no include guard (see
// cpu_lanes.h). A code is the byte of an fp8 value.

// 2 * kWidth codes, in the low bytes of a pair, in the order of the items.
template <class T, cpu::Stores kStores>
LANES void store_code_pair(uint8_t* at, Words a, Words b) {
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // even and odd items
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
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // even and odd items
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
    if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // of even items, of odd ones
      codes = _mm512_mask_blend_epi16(0x55555555u, _mm512_slli_epi32(second, 16), first);
    } else {
      const __m512i even = (__m512i)(lane_numbers() * 0x40004 + 0x20000);
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

template <cpu::Fp8 kFormat, cpu::Stores kStores = cpu::Stores::kCached, class T>
LANES void dequantize_pair(T* out, const uint8_t* codes, Floats scale) {
  const Pair x = load_decoded_pair<kFormat, T>(codes);
  store_pair<false, kStores>(out, Pair{x.a * scale, x.b * scale});
}
