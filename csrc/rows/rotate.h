// Rotary position embedding in interleaved order: pair i is columns 2i and 2i + 1.
#pragma once
#include <vector>

namespace k2 {

// The rotation of one position.
class Turn {
 public:
  // cos, sin: of each of so many pairs.
  Turn(const float* cos, const float* sin, int pairs);

  // x, out: 2 * pairs columns; they may be the same. (a cos - b sin, a sin + b cos), with one rounding each as torch.
  void rotate(const float* x, float* out) const;

 private:
  std::vector<float> cos_, sin_;  // [2 * pairs], of each column: of the first of a pair -sin
};

}  // namespace k2
