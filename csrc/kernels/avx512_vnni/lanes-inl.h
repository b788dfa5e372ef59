// Vectors of 16 lanes as one 512-bit register.

using F32x16 = __m512;
using I32x16 = __m512i;

K2_INLINE F32x16 f32(float x) { return _mm512_set1_ps(x); }
K2_INLINE I32x16 i32(int32_t x) { return _mm512_set1_epi32(x); }
K2_INLINE F32x16 as_f32(I32x16 x) { return _mm512_castsi512_ps(x); }
K2_INLINE I32x16 as_i32(F32x16 x) { return _mm512_castps_si512(x); }

K2_INLINE F32x16 load_f32(const float* x) { return _mm512_loadu_ps(x); }
K2_INLINE F32x16 load_bf16(const uint16_t* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
K2_INLINE void store_f32(F32x16 x, float* out) { _mm512_storeu_ps(out, x); }
K2_INLINE void store_i8(I32x16 x, int8_t* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x));
}

K2_INLINE F32x16 add(F32x16 x, F32x16 y) { return _mm512_add_ps(x, y); }
K2_INLINE F32x16 sub(F32x16 x, F32x16 y) { return _mm512_sub_ps(x, y); }
K2_INLINE F32x16 mul(F32x16 x, F32x16 y) { return _mm512_mul_ps(x, y); }
K2_INLINE F32x16 div(F32x16 x, F32x16 y) { return _mm512_div_ps(x, y); }
K2_INLINE F32x16 fma(F32x16 x, F32x16 y, F32x16 z) { return _mm512_fmadd_ps(x, y, z); }
K2_INLINE F32x16 min_f32(F32x16 x, F32x16 y) { return _mm512_min_ps(x, y); }
K2_INLINE F32x16 max_f32(F32x16 x, F32x16 y) { return _mm512_max_ps(x, y); }

K2_INLINE F32x16 to_f32(I32x16 x) { return _mm512_cvtepi32_ps(x); }
K2_INLINE I32x16 to_i32(F32x16 x) { return _mm512_cvtps_epi32(x); }

K2_INLINE I32x16 add(I32x16 x, I32x16 y) { return _mm512_add_epi32(x, y); }
K2_INLINE I32x16 sub(I32x16 x, I32x16 y) { return _mm512_sub_epi32(x, y); }
K2_INLINE I32x16 max_i32(I32x16 x, I32x16 y) { return _mm512_max_epi32(x, y); }
K2_INLINE I32x16 bit_and(I32x16 x, I32x16 y) { return _mm512_and_si512(x, y); }
template <int N>
K2_INLINE I32x16 shift_left(I32x16 x) {
  return _mm512_slli_epi32(x, N);
}
template <int N>
K2_INLINE I32x16 shift_right(I32x16 x) {
  return _mm512_srai_epi32(x, N);
}

K2_INLINE int32_t reduce_max(I32x16 x) { return _mm512_reduce_max_epi32(x); }
K2_INLINE int32_t reduce_add(I32x16 x) { return _mm512_reduce_add_epi32(x); }

// Four bytes in every lane.
K2_INLINE __m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm512_set1_epi32(four);
}

// Makes the compiler keep a sum in one register, where gcc copies those of a loop in and out: a copy is an instruction.
#if defined(__AVX512F__)
K2_INLINE void pin(__m512i& x) { __asm__("" : "+v"(x)); }
#else  // on a model of the instructions a vector is no register
K2_INLINE void pin(__m512i&) {}
#endif
