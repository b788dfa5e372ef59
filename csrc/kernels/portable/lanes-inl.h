// Vectors of 16 lanes as plain arrays: the meaning of every operation that the other instruction sets must match.

struct F32x16 {
  float v[16];
};
struct I32x16 {
  int32_t v[16];
};

template <class To, class From>
K2_INLINE To bit_cast(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

#define K2_LANES(type, expression) \
  type result;                     \
  for (int i = 0; i < 16; ++i) {   \
    result.v[i] = (expression);    \
  }                                \
  return result

K2_INLINE F32x16 f32(float x) { K2_LANES(F32x16, x); }
K2_INLINE I32x16 i32(int32_t x) { K2_LANES(I32x16, x); }
K2_INLINE F32x16 as_f32(I32x16 x) { return bit_cast<F32x16>(x); }
K2_INLINE I32x16 as_i32(F32x16 x) { return bit_cast<I32x16>(x); }

K2_INLINE F32x16 load_f32(const float* x) { K2_LANES(F32x16, x[i]); }
K2_INLINE F32x16 load_bf16(const uint16_t* x) { K2_LANES(F32x16, bit_cast<float>(uint32_t(x[i]) << 16)); }
K2_INLINE void store_f32(F32x16 x, float* out) { __builtin_memcpy(out, x.v, sizeof(x.v)); }
K2_INLINE void store_i8(I32x16 x, int8_t* out) {
  for (int i = 0; i < 16; ++i) out[i] = int8_t(x.v[i]);
}

K2_INLINE F32x16 add(F32x16 a, F32x16 b) { K2_LANES(F32x16, a.v[i] + b.v[i]); }
K2_INLINE F32x16 sub(F32x16 a, F32x16 b) { K2_LANES(F32x16, a.v[i] - b.v[i]); }
K2_INLINE F32x16 mul(F32x16 a, F32x16 b) { K2_LANES(F32x16, a.v[i] * b.v[i]); }
K2_INLINE F32x16 div(F32x16 a, F32x16 b) { K2_LANES(F32x16, a.v[i] / b.v[i]); }
K2_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { K2_LANES(F32x16, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
// The second operand where one is NaN.
K2_INLINE F32x16 min_f32(F32x16 a, F32x16 b) { K2_LANES(F32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
K2_INLINE F32x16 max_f32(F32x16 a, F32x16 b) { K2_LANES(F32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }

K2_INLINE F32x16 to_f32(I32x16 x) { K2_LANES(F32x16, float(x.v[i])); }
// To the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
K2_INLINE I32x16 to_i32(F32x16 x) { K2_LANES(I32x16, bit_cast<int32_t>(x.v[i] + 12582912.0f) - 0x4b400000); }

// Both wrap around.
K2_INLINE I32x16 add(I32x16 a, I32x16 b) { K2_LANES(I32x16, int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i]))); }
K2_INLINE I32x16 sub(I32x16 a, I32x16 b) { K2_LANES(I32x16, int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i]))); }
K2_INLINE I32x16 max_i32(I32x16 a, I32x16 b) { K2_LANES(I32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
K2_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { K2_LANES(I32x16, a.v[i] & b.v[i]); }
template <int N>
K2_INLINE I32x16 shift_left(I32x16 x) {
  K2_LANES(I32x16, int32_t(uint32_t(x.v[i]) << N));
}
template <int N>
K2_INLINE I32x16 shift_right(I32x16 x) {  // arithmetic
  K2_LANES(I32x16, x.v[i] >> N);
}
K2_INLINE int32_t reduce_max(I32x16 x) {
  int32_t result = x.v[0];
  for (int i = 1; i < 16; ++i) result = x.v[i] > result ? x.v[i] : result;
  return result;
}
K2_INLINE int32_t reduce_add(I32x16 x) {
  int32_t result = 0;
  for (int i = 0; i < 16; ++i) result += x.v[i];
  return result;
}

#undef K2_LANES
