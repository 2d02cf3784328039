// Rotation by the angles of a position on the CPU, shared by rotary_embedding and the fused MLA
// cache write.
#pragma once

#include <cstdint>
#include <vector>

#include "prim/cpu_lanes.h"

namespace elementwise {
namespace {

#define LANES_KERNEL "elementwise/rotary_lanes.h"
#include "prim/cpu_each_isa.h"

// The angles of one position after the other, and the heads that they turn.
template <class T>
class Rotation {
 public:
  Rotation(int64_t rot, bool neox) : half_(rot / 2), neox_(neox) {
    constexpr int64_t kWidestPair = 32;  // what the angles are padded to at most
    angles_.resize(2 * (half_ + kWidestPair));
  }

  // `row` holds half cosines, then half sines, which are multiplied by `sign`.
  template <class C>
  void load(const C* row, float sign) {
    neox_ ? PICK_ISA(load_angles<T, true, C>)(angles_.data(), row, half_, sign)
          : PICK_ISA(load_angles<T, false, C>)(angles_.data(), row, half_, sign);
  }

  // Heads `stride` elements apart, the first rotated element of the first at `head`.
  void turn(T* head, int64_t heads, int64_t stride) const {
    neox_ ? PICK_ISA(rotate_heads<T, true>)(head, heads, stride, angles_.data(), half_)
          : PICK_ISA(rotate_heads<T, false>)(head, heads, stride, angles_.data(), half_);
  }

 private:
  int64_t half_;
  bool neox_;
  std::vector<float> angles_;
};

}  // namespace
}  // namespace elementwise
