// Rotation of heads by the angles of one position, for one instruction set (see prim/cpu_lanes.h).
//
// The angles are fp32, padded with zeros to whole pairs of vectors: cosines, then sines. For the
// neox style, which loads elements in pairs of vectors, they lie in the order of such a pair.

LANES int64_t padded(int64_t half) { return (half + 2 * kWidth - 1) / (2 * kWidth) * 2 * kWidth; }

// The angles of 2 * kWidth elements, in the order in which load_pair<T> finds those.
template <class T, bool kNeox, class C>
LANES void load_angle_pair(float* out, const C* row, float sign) {
  Floats a = load(row) * sign, b = load(row + kWidth) * sign;
  if constexpr (kNeox && std::is_same_v<T, cpu::BFloat16>) {
    const Floats evens = even_items(a, b, kAll);
    b = odd_items(a, b, kAll);
    a = evens;
  }
  store(out, a);
  store(out + kWidth, b);
}

template <class T, bool kNeox, class C>
LANES void load_half(float* out, const C* row, int64_t half, float sign) {
  int64_t i = 0;
  for (; i + 2 * kWidth <= half; i += 2 * kWidth) {
    load_angle_pair<T, kNeox>(out + i, row + i, sign);
  }
  if (i == half) return;
  C rest[2 * kWidth] = {};
  std::memcpy(rest, row + i, (half - i) * sizeof(C));
  load_angle_pair<T, kNeox>(out + i, rest, sign);
}

// A row of the cos-sin cache, half cosines and half sines, as fp32; the sines times sign.
template <class T, bool kNeox, class C>
void load_angles(float* out, const C* row, int64_t half, float sign) {
  load_half<T, kNeox>(out, row, half, 1.0f);
  load_half<T, kNeox>(out + padded(half), row + half, half, sign);
}

LANES Pair turned(Pair x, const float* cos, Pair y, const float* sin) {
  return {x.a * load(cos) + y.a * load(sin), x.b * load(cos + kWidth) + y.b * load(sin + kWidth)};
}

// 2 * kWidth elements of each half of a head.
template <class T>
LANES void turn_halves(T* first, T* second, const float* cos, const float* sin) {
  const Pair x = load_pair(first), y = load_pair(second);
  store_pair(first, turned(x, cos, {-y.a, -y.b}, sin));
  store_pair(second, turned(y, cos, x, sin));
}

// kWidth pairs of neighbours.
template <class T>
LANES void turn_neighbours(T* at, const float* cos, const float* sin) {
  Pair v = load_pair(at);
  const Floats c = load(cos), s = load(sin);
  if constexpr (std::is_same_v<T, cpu::BFloat16>) {  // apart already
    store_pair(at, Pair{v.a * c - v.b * s, v.b * c + v.a * s});
  } else {
    const Floats x = even_items(v.a, v.b, kAll), y = odd_items(v.a, v.b, kAll);
    const Floats a = x * c - y * s, b = y * c + x * s;
    store_pair(at, Pair{interleaved_from<0>(a, b, kAll), interleaved_from<kWidth / 2>(a, b, kAll)});
  }
}

template <class T, bool kNeox>
LANES void rotate_head(T* head, const float* cos, const float* sin, int64_t half) {
  constexpr int64_t kStep = kNeox ? 2 * kWidth : kWidth;
  int64_t i = 0;
  for (; i + kStep <= half; i += kStep) {
    if constexpr (kNeox) {
      turn_halves(head + i, head + half + i, cos + i, sin + i);
    } else {
      turn_neighbours(head + 2 * i, cos + i, sin + i);
    }
  }
  if (i == half) return;
  // What is left goes through buffers of whole vectors.
  const int64_t bytes = (half - i) * static_cast<int64_t>(sizeof(T));
  T x[2 * kWidth] = {}, y[2 * kWidth] = {};
  if constexpr (kNeox) {
    std::memcpy(x, head + i, bytes);
    std::memcpy(y, head + half + i, bytes);
    turn_halves(x, y, cos + i, sin + i);
    std::memcpy(head + i, x, bytes);
    std::memcpy(head + half + i, y, bytes);
  } else {
    std::memcpy(x, head + 2 * i, 2 * bytes);
    turn_neighbours(x, cos + i, sin + i);
    std::memcpy(head + 2 * i, x, 2 * bytes);
  }
}

// Heads `stride` elements apart, each from its first rotated element on.
template <class T, bool kNeox>
void rotate_heads(T* head, int64_t heads, int64_t stride, const float* angles, int64_t half) {
  for (int64_t h = 0; h < heads; ++h, head += stride) {
    rotate_head<T, kNeox>(head, angles, angles + padded(half), half);
  }
}
