// Packing of A16Words on AVX2; included after `a16-inl.h`.

K2_INLINE bool pack_group(F32x16 x0, F32x16 x1, A16Words* group) {
  const FixedPoint x = fixed_point(x0, x1);
  const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  for (int i = 0; i < 2; ++i) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.n[i].a, x.n[i].b), 0xd8);  // as in store_i8
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(group->n + 16 * i), _mm256_shuffle_epi8(words, order));
  }
  group->exponent = x.exponent;
  group->correction = -8 * reduce_add(add(x.n[0], x.n[1]));
  return x.fits;
}
