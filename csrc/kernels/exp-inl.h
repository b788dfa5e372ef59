// The exponential function, one text for all instruction sets; included after `lanes-inl.h`. No include guard: it has no
// meaning outside the anonymous namespace of a kernel file.

// e^x = mantissa * 2^exponent.
struct Exponential {
  F32x16 mantissa;
  I32x16 exponent;
};

// Relative error below 2^-22. x = n ln2 + r; ln2 is split into 0.693359375 (9 bits: n times it is exact) and the rest;
// exp(r) is the polynomial of Cephes' expf on [-ln2/2, ln2/2].
K2_INLINE Exponential exponential(F32x16 x) {
  const I32x16 n = to_i32(mul(x, f32(1.44269504089f)));
  const F32x16 n_f32 = to_f32(n);
  F32x16 r = fma(n_f32, f32(-0.693359375f), x);
  r = fma(n_f32, f32(2.12194440e-4f), r);
  F32x16 p = f32(1.9875691500e-4f);
  p = fma(p, r, f32(1.3981999507e-3f));
  p = fma(p, r, f32(8.3334519073e-3f));
  p = fma(p, r, f32(4.1665795894e-2f));
  p = fma(p, r, f32(1.6666665459e-1f));
  p = fma(p, r, f32(5.0000001201e-1f));
  return {fma(mul(p, r), r, add(r, f32(1.0f))), n};
}

// 2^n for n in -126..127, and exactly zero for n = -127.
K2_INLINE F32x16 power_of_two(I32x16 n) { return as_f32(shift_left<23>(add(n, i32(127)))); }
