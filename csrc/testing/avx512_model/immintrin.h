// A scalar model of the AVX-512 instructions that the kernels use, for tests on CPUs without them.
//
// The test compiles a kernel file unchanged with this folder first in the include path, so that `<immintrin.h>` is this
// file. Each function does what Intel's manual says the instruction does, lane by lane, and no more than the kernels
// need is here: another intrinsic is a compile error, not a guess.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace avx512_model {

template <class Lane, int N>
struct alignas(sizeof(Lane) * N) Lanes {
  Lane v[N];
};

template <class To, class From>
To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace avx512_model

using __m512 = avx512_model::Lanes<float, 16>;
using __m512i = avx512_model::Lanes<int32_t, 16>;
using __m256i = avx512_model::Lanes<int32_t, 8>;
using __m128i = avx512_model::Lanes<int32_t, 4>;

#define K2_MODEL_LANES(type, expression)              \
  type r;                                             \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r

inline __m512 _mm512_setzero_ps() { K2_MODEL_LANES(__m512, 0.0f); }
inline __m512i _mm512_setzero_si512() { K2_MODEL_LANES(__m512i, 0); }
inline __m512 _mm512_set1_ps(float x) { K2_MODEL_LANES(__m512, x); }
inline __m512i _mm512_set1_epi32(int32_t x) { K2_MODEL_LANES(__m512i, x); }
inline __m512i _mm512_set1_epi16(int16_t x) { K2_MODEL_LANES(__m512i, int32_t(uint32_t(uint16_t(x)) * 0x00010001u)); }
inline __m512i _mm512_set1_epi8(int8_t x) { K2_MODEL_LANES(__m512i, int32_t(uint32_t(uint8_t(x)) * 0x01010101u)); }
inline __m512 _mm512_castsi512_ps(__m512i x) { return avx512_model::reinterpret<__m512>(x); }
inline __m512i _mm512_castps_si512(__m512 x) { return avx512_model::reinterpret<__m512i>(x); }

// Loads and stores. The aligned form faults on an address that is not a multiple of 64 (#GP).
inline __m512i _mm512_load_si512(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) {
    std::fprintf(stderr, "vmovdqa: address %p is not a multiple of 64\n", p);
    std::abort();
  }
  __m512i r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 r;
  std::memcpy(&r, p, sizeof(r));
  return r;
}
inline __m256i _mm256_loadu_si256(const __m256i* p) {
  __m256i r;
  std::memcpy(&r, static_cast<const void*>(p), sizeof(r));
  return r;
}
inline void _mm512_storeu_ps(void* p, __m512 x) { std::memcpy(p, &x, sizeof(x)); }
inline void _mm_storeu_si128(__m128i* p, __m128i x) { std::memcpy(static_cast<void*>(p), &x, sizeof(x)); }
enum { _MM_HINT_T1 = 2 };
inline void _mm_prefetch(const char*, int) {}

// Floating point: one rounding each, to nearest even (MXCSR at its default).
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { K2_MODEL_LANES(__m512, a.v[i] + b.v[i]); }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { K2_MODEL_LANES(__m512, a.v[i] - b.v[i]); }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { K2_MODEL_LANES(__m512, a.v[i] * b.v[i]); }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { K2_MODEL_LANES(__m512, a.v[i] / b.v[i]); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  K2_MODEL_LANES(__m512, std::fma(a.v[i], b.v[i], c.v[i]));
}
// MINPS and MAXPS return the second operand if either is NaN, and if both are zeros.
inline __m512 _mm512_min_ps(__m512 a, __m512 b) { K2_MODEL_LANES(__m512, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { K2_MODEL_LANES(__m512, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }

// Conversions. CVTPS2DQ gives the "integer indefinite" value for NaN and out of range.
inline __m512 _mm512_cvtepi32_ps(__m512i x) { K2_MODEL_LANES(__m512, float(x.v[i])); }
inline int32_t avx512_model_cvtss2si(float x) {
  const float rounded = std::nearbyintf(x);
  return rounded >= -2147483648.0f && rounded < 2147483648.0f ? int32_t(rounded) : INT32_MIN;
}
inline __m512i _mm512_cvtps_epi32(__m512 x) { K2_MODEL_LANES(__m512i, avx512_model_cvtss2si(x.v[i])); }
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  const auto words = avx512_model::reinterpret<avx512_model::Lanes<uint16_t, 16>>(x);
  K2_MODEL_LANES(__m512i, words.v[i]);
}
inline __m128i _mm512_cvtepi32_epi8(__m512i x) {  // VPMOVDB truncates
  avx512_model::Lanes<uint8_t, 16> bytes;
  for (int i = 0; i < 16; ++i) bytes.v[i] = uint8_t(x.v[i]);
  return avx512_model::reinterpret<__m128i>(bytes);
}

// Integers wrap around.
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  K2_MODEL_LANES(__m512i, int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i])));
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  K2_MODEL_LANES(__m512i, int32_t(uint32_t(a.v[i]) - uint32_t(b.v[i])));
}
inline __m512i _mm512_max_epi32(__m512i a, __m512i b) { K2_MODEL_LANES(__m512i, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { K2_MODEL_LANES(__m512i, a.v[i] & b.v[i]); }
// Counts above the width give zero (or the sign).
inline __m512i _mm512_slli_epi32(__m512i x, unsigned n) {
  K2_MODEL_LANES(__m512i, n > 31 ? 0 : int32_t(uint32_t(x.v[i]) << n));
}
inline __m512i _mm512_srai_epi32(__m512i x, unsigned n) { K2_MODEL_LANES(__m512i, x.v[i] >> (n > 31 ? 31 : n)); }
inline __m512i _mm512_srli_epi16(__m512i x, unsigned n) {
  auto words = avx512_model::reinterpret<avx512_model::Lanes<uint16_t, 32>>(x);
  for (uint16_t& word : words.v) word = n > 15 ? 0 : uint16_t(word >> n);
  return avx512_model::reinterpret<__m512i>(words);
}
inline __m512i _mm512_mulhi_epu16(__m512i a, __m512i b) {
  auto words = avx512_model::reinterpret<avx512_model::Lanes<uint16_t, 32>>(a);
  const auto factors = avx512_model::reinterpret<avx512_model::Lanes<uint16_t, 32>>(b);
  for (int i = 0; i < 32; ++i) words.v[i] = uint16_t(uint32_t(words.v[i]) * factors.v[i] >> 16);
  return avx512_model::reinterpret<__m512i>(words);
}
inline int32_t _mm512_reduce_add_epi32(__m512i x) {
  uint32_t sum = 0;
  for (const int32_t lane : x.v) sum += uint32_t(lane);
  return int32_t(sum);
}
inline int32_t _mm512_reduce_max_epi32(__m512i x) {
  int32_t max = x.v[0];
  for (const int32_t lane : x.v) max = lane > max ? lane : max;
  return max;
}

// VPDPBUSD: per lane, four products of an unsigned byte of `u` and a signed byte of `s`, each sign-extended to 16 bits,
// added to the lane without saturation.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i u, __m512i s) {
  const auto ub = avx512_model::reinterpret<avx512_model::Lanes<uint8_t, 64>>(u);
  const auto sb = avx512_model::reinterpret<avx512_model::Lanes<int8_t, 64>>(s);
  for (int i = 0; i < 16; ++i) {
    uint32_t lane = uint32_t(sum.v[i]);
    for (int j = 0; j < 4; ++j) lane += uint32_t(int32_t(int16_t(ub.v[4 * i + j] * sb.v[4 * i + j])));
    sum.v[i] = int32_t(lane);
  }
  return sum;
}

#undef K2_MODEL_LANES

#include "testing/avx512_model/bf16.h"
#include "testing/avx512_model/pack.h"
