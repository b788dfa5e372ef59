// Packing for numerics A16 (see a16.h), one text for all instruction sets; included after their `lanes-inl.h`.

// 32 activations as n * 2^k; see a16.h.
struct FixedPoint {
  I32x16 n[2];
  int32_t exponent;  // (k + 60) << 23
  bool fits;         // else n is zero
};

// The largest magnitude is taken on the bit patterns, where NaN and infinity are larger than every number: nothing is
// hidden by a comparison.
K2_INLINE FixedPoint fixed_point(F32x16 x0, F32x16 x1) {
  const I32x16 magnitude = i32(0x7fffffff);
  const int32_t largest = reduce_max(max_i32(bit_and(as_i32(x0), magnitude), bit_and(as_i32(x1), magnitude)));
  // 32512 = 1.984375 * 2^14 and 0x1ffff carries into the exponent where the mantissa is above 1.984375. Unsigned: the
  // largest NaN carries into the sign.
  int32_t k = int32_t((uint32_t(largest) + 0x1ffff) >> 23) - (127 + 14);
  const bool fits = k <= kExponentBase;
  k = k < kLeastExponent ? kLeastExponent : k;
  if (!fits) {
    x0 = x1 = f32(0.0f);
    k = 0;
  }
  const F32x16 inverse = as_f32(i32((127 - k) << 23));
  return {{to_i32(mul(x0, inverse)), to_i32(mul(x1, inverse))}, (k + kExponentBase) << 23, fits};
}

K2_INLINE bool pack_group(F32x16 x0, F32x16 x1, A16Group* group) {
  const FixedPoint x = fixed_point(x0, x1);
  for (int i = 0; i < 2; ++i) {
    const I32x16 high = shift_right<8>(add(x.n[i], i32(128)));
    store_i8(high, group->high + 16 * i);
    store_i8(sub(x.n[i], shift_left<8>(high)), group->low + 16 * i);
  }
  group->exponent = x.exponent;
  group->correction = -8 * reduce_add(add(x.n[0], x.n[1]));
  return x.fits;
}
