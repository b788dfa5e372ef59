// bf16 as bits: the upper half of an fp32 number.
#pragma once
#include <bit>
#include <cstdint>

namespace k2 {

// To nearest even; a NaN becomes a quiet one, not an infinity.
inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void round_to_bf16(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = round_to_bf16(x[i]);
}

}  // namespace k2
