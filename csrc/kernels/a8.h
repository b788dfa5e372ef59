// Numerics A8 ("fast"): activations as 8-bit integers with one fp32 scale per group.
//
// A group of 32 activations x with the largest magnitude m is stored as integers n = round(x * 127 / m), |n| <= 127. Then
//   sum over the group of q * n                      is an integer below 2^15 (32 * 8 * 127), hence exact in fp32, and
//   result = fma(float(sum), scale * (m / 127), result)
// rounds twice, always the same way; groups are added in ascending order, so a result depends on the inputs alone and not
// on the tile, the thread or the instruction set. The weights take one multiplication where A16 takes two.
//
// The scale is not a power of two, as A16's is, because that would cost up to one of the eight bits: error 1.8e-2 instead
// of 1.2e-2 (gaussian), 2.6e-2 instead of 1.8e-2 (outlier channels).
//
// Range: m must be below 2^67 (1.5e20), so that the factor below stays finite; a group with a NaN, an infinity or a larger
// magnitude is stored as zeros and reported, and the token's output row becomes NaN. A group with m below 2^-61 is zero.
#pragma once
#include <stdint.h>

namespace k2 {

// One token's group of 32 activations. 40 bytes: 4-byte loads never cross a cache line.
struct A8Group {
  int8_t values[32];
  float factor;        // m / 127 * 2^60: sums carry the factor 2^60 in every numerics
  int32_t correction;  // -8 * sum(n): takes back the +8 of the nibbles
};

constexpr int kA8Largest = 127;
constexpr int kA8Limit = (127 + 67) << 23;  // bits of 2^67
constexpr int kA8Least = (127 - 61) << 23;  // bits of 2^-61

}  // namespace k2
