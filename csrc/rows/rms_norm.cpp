#include "rows/rms_norm.h"

#include <algorithm>
#include <cmath>

#include "rows/vectors.h"

namespace k2 {
namespace {

constexpr int64_t kBlock = 256;
constexpr int kSums = 4;  // vectors that are summed side by side: an addition takes four cycles

double sum_of_squares(const float* x, int64_t n) {
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = std::min(n, first + kBlock);
    F32x4 sums[kSums] = {};
    int64_t i = first;
    for (; i + kSums * kLanes <= last; i += kSums * kLanes) {
      for (int s = 0; s < kSums; ++s) {
        const F32x4 v = load(x + i + s * kLanes);
        sums[s] += v * v;
      }
    }
    for (int s = 0; i < last; ++s, i += kLanes) {
      const F32x4 v = load_first(x + i, std::min<int64_t>(kLanes, last - i));
      sums[s] += v * v;
    }
    const F32x4 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    total += (double(sum[0]) + sum[1]) + (double(sum[2]) + sum[3]);
  }
  return total;
}

}  // namespace

void rms_norm(const float* x, int64_t n, const NormWeight& weight, float* out) {
  const float factor = 1 / std::sqrt(float(sum_of_squares(x, n) / double(n)) + weight.eps);
  auto scale = [factor](F32x4 v, F32x4 w) { return v * factor * w; };
  if (weight.bf16) return for_numbers(n, out, scale, x, static_cast<const uint16_t*>(weight.numbers));
  for_numbers(n, out, scale, x, static_cast<const float*>(weight.numbers));
}

}  // namespace k2
