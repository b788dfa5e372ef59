#include "rows/rotate.h"

#include "rows/vectors.h"

namespace k2 {

Turn::Turn(const float* cos, const float* sin, int pairs) : cos_(2 * size_t(pairs)), sin_(2 * size_t(pairs)) {
  for (int i = 0; i < pairs; ++i) {
    cos_[2 * i] = cos_[2 * i + 1] = cos[i];
    sin_[2 * i] = -sin[i];
    sin_[2 * i + 1] = sin[i];
  }
}

void Turn::rotate(const float* x, float* out) const {
  typedef uint64_t Pairs __attribute__((vector_size(16)));
  auto turn = [](F32x4 v, F32x4 cos, F32x4 sin) {
    const Pairs pairs = Pairs(v);
    const F32x4 other = F32x4((pairs >> 32) | (pairs << 32));  // of the same pair
    return v * cos + other * sin;
  };
  for_numbers(int64_t(cos_.size()), out, turn, x, cos_.data(), sin_.data());
}

}  // namespace k2
