// Packing for numerics A8 (see a8.h), one text for all instruction sets; included after their
// `lanes-inl.h`. Both matrices of an expert take their input in this form.

// The largest magnitude is taken on the bit patterns, as for A16.
K2_INLINE bool pack_group(F32x16 x0, F32x16 x1, A8Group* group) {
  const I32x16 magnitude = i32(0x7fffffff);
  int32_t largest = reduce_max(max_i32(bit_and(as_i32(x0), magnitude), bit_and(as_i32(x1), magnitude)));
  const bool fits = largest < kA8Limit;
  const bool zero = !fits || largest < kA8Least;
  if (zero) {
    x0 = x1 = f32(0.0f);
    largest = 0x3f800000;  // one: any number that divides
  }
  float m;
  __builtin_memcpy(&m, &largest, sizeof(m));
  const F32x16 inverse = f32(kA8Largest / m);
  const I32x16 n0 = to_i32(mul(x0, inverse));
  const I32x16 n1 = to_i32(mul(x1, inverse));
  store_i8(n0, group->values);
  store_i8(n1, group->values + 16);
  group->factor = zero ? 0.0f : m / kA8Largest * 0x1p60f;
  group->correction = -8 * reduce_add(add(n0, n1));
  return fits;
}
