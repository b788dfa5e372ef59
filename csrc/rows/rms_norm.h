// RMSNorm of one row.
#pragma once
#include <cstdint>

namespace k2 {

// A norm's weight, one number per column.
struct NormWeight {
  const void* numbers;
  bool bf16;  // else fp32
  float eps;
};

// out[i] = x[i] / sqrt(mean of squares + eps) * weight[i]; `out` may be `x`. The sum of squares has a relative error
// below 20 * 2^-24 for any n: blocks of 256 in fp32, in 16 lanes, then in float64. It depends on the row alone.
void rms_norm(const float* x, int64_t n, const NormWeight& weight, float* out);

}  // namespace k2
