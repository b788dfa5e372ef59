// Elementwise functions.
#pragma once
#include <cstdint>

namespace k2 {

// out = gate / (1 + e^-gate) * up; `out` may be one of the inputs. As torch, NaN for a gate of -infinity.
void silu_times(const float* gate, const float* up, int64_t n, float* out);

// out = 1 / (1 + e^-x); `out` may be `x`.
void sigmoid(const float* x, int64_t n, float* out);

}  // namespace k2
