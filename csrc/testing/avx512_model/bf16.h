// The part of the AVX-512 model that the bf16 kernels use; included by immintrin.h, which has the types.
#pragma once
#include "testing/amx_model/amx.h"

using __m512bh = avx512_model::Lanes<uint16_t, 32>;

namespace avx512_model {

// VCVTNE2PS2BF16: to nearest even, denormals are zero, a NaN keeps its upper half and becomes quiet.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = reinterpret<uint32_t>(x);
  if (std::isnan(x)) return uint16_t((bits >> 16) | 0x40);
  if (std::fpclassify(x) == FP_SUBNORMAL) return uint16_t((bits >> 16) & 0x8000);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t bits) { return amx_model::flushed(reinterpret<float>(uint32_t(bits) << 16)); }

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 == 0) return;
  std::fprintf(stderr, "vmovdqa: address %p is not a multiple of 64\n", p);
  std::abort();
}

}  // namespace avx512_model

inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  __m512bh r;
  for (int i = 0; i < 16; ++i) {
    r.v[i] = avx512_model::to_bf16(low.v[i]);
    r.v[16 + i] = avx512_model::to_bf16(high.v[i]);
  }
  return r;
}

// VDPBF16PS: per lane, the odd element's product, then the even one's, each by a fused multiply-add; to nearest even and
// with denormals as zero, whatever MXCSR says.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i) {
    float lane = amx_model::flushed(sum.v[i]);
    for (const int j : {2 * i + 1, 2 * i}) {
      lane = amx_model::fused(avx512_model::from_bf16(a.v[j]), avx512_model::from_bf16(b.v[j]), lane);
    }
    sum.v[i] = lane;
  }
  return sum;
}

// VPERMW: only the low 5 bits of an index count.
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i x) {
  const auto from = avx512_model::reinterpret<avx512_model::Lanes<uint16_t, 32>>(x);
  auto words = avx512_model::reinterpret<avx512_model::Lanes<uint16_t, 32>>(index);
  for (uint16_t& word : words.v) word = from.v[word & 31];
  return avx512_model::reinterpret<__m512i>(words);
}

inline __m128i _mm_loadu_si128(const __m128i* p) {
  __m128i r;
  std::memcpy(&r, static_cast<const void*>(p), sizeof(r));
  return r;
}
inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
  const auto bytes = avx512_model::reinterpret<avx512_model::Lanes<int8_t, 16>>(x);
  __m512i r;
  for (int i = 0; i < 16; ++i) r.v[i] = bytes.v[i];
  return r;
}

inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof(x)); }
inline void _mm512_store_si512(void* p, __m512i x) {
  avx512_model::check_aligned(p);
  std::memcpy(p, &x, sizeof(x));
}
inline __m512 _mm512_load_ps(const void* p) {
  avx512_model::check_aligned(p);
  return _mm512_loadu_ps(p);
}
inline void _mm512_store_ps(void* p, __m512 x) {
  avx512_model::check_aligned(p);
  std::memcpy(p, &x, sizeof(x));
}
