// Vectors of 4 fp32 numbers as GCC and Clang know them on every CPU.
//
// The files of this folder are compiled once, for the baseline, and never contract a product and a sum into one
// rounding: so their results are the same bits on every CPU. Wider vectors would gain microseconds per layer.
#pragma once
#include <cstdint>
#include <cstring>

#include "core/shuffle.h"

namespace k2 {

typedef float F32x4 __attribute__((vector_size(16)));
typedef int32_t I32x4 __attribute__((vector_size(16)));

constexpr int kLanes = 4;

inline F32x4 load(const float* from) {
  F32x4 x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// bf16 bits.
inline F32x4 load(const uint16_t* from) {
  typedef uint16_t Halves __attribute__((vector_size(16)));
  Halves bits = {};
  std::memcpy(&bits, from, kLanes * sizeof(uint16_t));
  return F32x4(K2_SHUFFLE(Halves{}, bits, 0, 8, 1, 9, 2, 10, 3, 11));  // little-endian: the upper half comes second
}

inline void store(F32x4 x, float* out) { std::memcpy(out, &x, sizeof(x)); }

// The first `count` of four numbers, and zeros.
template <class Real>
F32x4 load_first(const Real* from, int64_t count) {
  Real numbers[kLanes] = {};
  std::memcpy(numbers, from, size_t(count) * sizeof(Real));
  return load(numbers);
}

// out[i] = f(inputs[i]...) for i < n, where f takes vectors; `out` may be one of the inputs.
template <class F, class... Real>
void for_numbers(int64_t n, float* out, F f, const Real*... inputs) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(f(load(inputs + i)...), out + i);
  if (i == n) return;
  const F32x4 last = f(load_first(inputs + i, n - i)...);
  std::memcpy(out + i, &last, size_t(n - i) * sizeof(float));
}

// 2^n for n in -126..127.
inline F32x4 power_of_two(I32x4 n) { return F32x4((n + 127) << 23); }

// e^x with a relative error below 2^-22 where it is a normal number; above 88.73 infinite, below -104 zero, of NaN NaN.
// The reduction and the polynomial are those of kernels/exp-inl.h, with two roundings where that has one. 2^n is
// multiplied in two steps: it may be beyond the range of fp32 where e^x is not.
inline F32x4 exponential(F32x4 x) {
  x = x < -104.0f ? F32x4{} - 104.0f : x;
  x = x > 89.0f ? F32x4{} + 89.0f : x;
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: added, it leaves the nearest integer in the low bits
  const F32x4 shifted = x * 1.44269504089f + kToInteger;
  const I32x4 n = I32x4(shifted) - 0x4b400000;
  const F32x4 n_f32 = shifted - kToInteger;
  F32x4 r = x - n_f32 * 0.693359375f;  // both exact: 9 bits times 8, and a difference of near numbers
  r = r + n_f32 * 2.12194440e-4f;
  F32x4 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + (r + 1.0f);
  const I32x4 half = n >> 1;
  return p * power_of_two(half) * power_of_two(n - half);
}

}  // namespace k2
