// Packing of hidden states for numerics bf16 (see bf16.h), one text for all instruction sets; included after
// `a16-inl.h` and before `work-inl.h`. Hidden is their form: A16Group, or Bf16Group with a pack_group of its own.

// To nearest even. Infinity stays infinity; a NaN may become anything.
K2_INLINE F32x16 round_bf16(F32x16 x) {
  const I32x16 odd = bit_and(shift_right<16>(as_i32(x)), i32(1));
  return as_f32(bit_and(add(add(as_i32(x), i32(0x7fff)), odd), i32(int32_t(0xffff0000))));
}

template <class Hidden>
K2_INLINE bool pack_rounded(F32x16 x0, F32x16 x1, Hidden* group) {
  const I32x16 magnitude = i32(0x7fffffff);
  const int32_t largest = reduce_max(max_i32(bit_and(as_i32(x0), magnitude), bit_and(as_i32(x1), magnitude)));
  return pack_group(round_bf16(x0), round_bf16(x1), group) & (largest < 0x7f800000);
}

template <class Hidden>
bool pack_hidden_fp32(const float* x, int groups, uint8_t* packed) {
  Hidden* group = reinterpret_cast<Hidden*>(packed);
  bool fits = true;
  for (int g = 0; g < groups; ++g, x += kGroup) fits &= pack_rounded(load_f32(x), load_f32(x + 16), group + g);
  return fits;
}
