// Numerics A16: activations in 16-bit fixed point, as two planes of 8 bits.
//
// A group of 32 activations x is stored as integers n = round(x * 2^-k) with |n| <= 32512 and split n = 256 * high +
// low into two signed bytes. k is the smallest exponent for which the largest |x| of the group fits, at least -59. Then
//   sum over the group of q * n = 256 * dot(q, high) + dot(q, low)
// is an exact integer below 2^23 (32 * 8 * 32512), hence exact in fp32, and
//   result = fma(float(sum), scale * 2^k, result)
// is the only rounding; groups are added in ascending order, so a result depends on the inputs alone and not on the
// tile, the thread or the instruction set. Multiplying by 2^k is an integer addition to the exponent of the scale, off
// the multiplier pipes; `exponent` holds (k + 60) << 23, and the common factor 2^60 is taken back once at the end.
//
// Range: a scale must be finite and below 256 in magnitude (checked when weights are packed), so that exponents cannot
// overflow. Activations below 2^-60 become zero. A group with a NaN, an infinity or a magnitude above 32512 * 2^60
// (3.7e22) has no fixed-point form: it is stored as zeros and reported, and the token's output row becomes NaN.
// A scale of zero acts as 2^-127: its weights contribute less than 1e-33 of the group's largest activation.
#pragma once
#include <stdint.h>

namespace k2 {

// One token's group of 32 activations. 72 bytes: 4-byte loads never cross a cache line.
struct A16Group {
  int8_t high[32];
  int8_t low[32];
  int32_t exponent;    // (k + 60) << 23
  int32_t correction;  // -8 * sum(n): takes back the +8 of the nibbles
};

// The same for multipliers of 16-bit numbers, which need no planes: a table says which of the two it reads. 72 bytes.
struct A16Words {
  int16_t n[32];  // of every 8 inputs in the order of kWordOrder
  int32_t exponent;
  int32_t correction;
};

// L32 keeps inputs j and j+4 of 8 in one byte: read by steps of 4 bits, the 16-bit words of a lane meet the pairs (0,2)
// (4,6) (1,3) (5,7).
constexpr uint8_t kWordOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};

constexpr int kExponentBase = 60;
constexpr int kLeastExponent = 1 - kExponentBase;  // a factor scale * 2^(k + 60) is a normal number for every scale
constexpr int kScaleExponentLimit = 135;  // biased exponent of a bf16 scale must be below: |scale| < 256

}  // namespace k2
