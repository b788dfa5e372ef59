// Vectors of 16 lanes as two 256-bit registers.

struct F32x16 {
  __m256 a, b;
};
struct I32x16 {
  __m256i a, b;
};

K2_INLINE F32x16 f32(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
K2_INLINE I32x16 i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
K2_INLINE F32x16 as_f32(I32x16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
K2_INLINE I32x16 as_i32(F32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }

K2_INLINE F32x16 load_f32(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
K2_INLINE __m256 load_bf16_x8(const uint16_t* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
K2_INLINE F32x16 load_bf16(const uint16_t* x) { return {load_bf16_x8(x), load_bf16_x8(x + 8)}; }
K2_INLINE void store_f32(F32x16 x, float* out) {
  _mm256_storeu_ps(out, x.a);
  _mm256_storeu_ps(out + 8, x.b);
}
// The values fit int8, so the saturation of the packs does nothing.
K2_INLINE void store_i8(I32x16 x, int8_t* out) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);  // packs works per 128-bit half
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
}

K2_INLINE F32x16 add(F32x16 x, F32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
K2_INLINE F32x16 sub(F32x16 x, F32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
K2_INLINE F32x16 mul(F32x16 x, F32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
K2_INLINE F32x16 div(F32x16 x, F32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
K2_INLINE F32x16 fma(F32x16 x, F32x16 y, F32x16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
K2_INLINE F32x16 min_f32(F32x16 x, F32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
K2_INLINE F32x16 max_f32(F32x16 x, F32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }

K2_INLINE F32x16 to_f32(I32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
K2_INLINE I32x16 to_i32(F32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }

K2_INLINE I32x16 add(I32x16 x, I32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
K2_INLINE I32x16 sub(I32x16 x, I32x16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
K2_INLINE I32x16 max_i32(I32x16 x, I32x16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
K2_INLINE I32x16 bit_and(I32x16 x, I32x16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int N>
K2_INLINE I32x16 shift_left(I32x16 x) {
  return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N>
K2_INLINE I32x16 shift_right(I32x16 x) {
  return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)};
}

K2_INLINE int32_t reduce_max(I32x16 x) {
  const __m256i both = _mm256_max_epi32(x.a, x.b);
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}
K2_INLINE int32_t reduce_add(I32x16 x) {
  const __m256i both = _mm256_add_epi32(x.a, x.b);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

// Two words in every lane.
K2_INLINE __m256i broadcast_pair(const int16_t* n) {
  int32_t two;
  __builtin_memcpy(&two, n, sizeof(two));
  return _mm256_set1_epi32(two);
}

// Keeps a partial sum in its register at this point: left alone, gcc collects several products before it adds them, and
// spills them all.
K2_INLINE void pin(__m256i& sum) { __asm__("" : "+x"(sum)); }
K2_INLINE void pin(__m256& sum) { __asm__("" : "+x"(sum)); }
