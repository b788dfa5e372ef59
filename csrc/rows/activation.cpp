#include "rows/activation.h"

#include "rows/vectors.h"

namespace k2 {

void silu_times(const float* gate, const float* up, int64_t n, float* out) {
  for_numbers(n, out, [](F32x4 g, F32x4 u) { return g / (exponential(-g) + 1.0f) * u; }, gate, up);
}

void sigmoid(const float* x, int64_t n, float* out) {
  for_numbers(n, out, [](F32x4 v) { return 1.0f / (exponential(-v) + 1.0f); }, x);
}

}  // namespace k2
