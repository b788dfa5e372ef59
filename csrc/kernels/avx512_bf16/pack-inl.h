// Packs one group of hidden values that are bf16 numbers: then n is exact in bf16; see bf16.h.
K2_INLINE bool pack_group(F32x16 x0, F32x16 x1, Bf16Group* group) {
  const FixedPoint x = fixed_point(x0, x1);
  _mm512_storeu_si512(group->values, to_pairs(to_f32(x.n[0]), to_f32(x.n[1])));
  group->exponent = x.exponent;
  group->unused = 0;
  return x.fits;
}
