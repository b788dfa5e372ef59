// The part of the AVX-512 model that the packer uses; included by immintrin.h, which has the types.
#pragma once

using __mmask8 = uint8_t;
using __mmask32 = uint32_t;

namespace avx512_model {

template <class Lane, class Vector>
using As = Lanes<Lane, int(sizeof(Vector) / sizeof(Lane))>;

// Lane i = lane(i, lane i of x, lane i of y).
template <class Lane, class Vector, class F>
Vector each(const Vector& x, const Vector& y, F lane) {
  auto a = reinterpret<As<Lane, Vector>>(x);
  const auto b = reinterpret<As<Lane, Vector>>(y);
  for (int i = 0; i < int(sizeof(Vector) / sizeof(Lane)); ++i) a.v[i] = lane(i, a.v[i], b.v[i]);
  return reinterpret<Vector>(a);
}

// PUNPCKL and PUNPCKH: within each 128 bits, the lanes of the lower or upper half by turns.
template <class Lane, class Vector>
Vector unpack(const Vector& x, const Vector& y, bool upper) {
  constexpr int kLanes = 16 / sizeof(Lane);
  const auto a = reinterpret<As<Lane, Vector>>(x), b = reinterpret<As<Lane, Vector>>(y);
  return each<Lane>(x, y, [&](int i, Lane, Lane) {
    const int from = i / kLanes * kLanes + i % kLanes / 2 + (upper ? kLanes / 2 : 0);
    return i % 2 ? b.v[from] : a.v[from];
  });
}

inline __m128i quarter(const __m512i& x, int at) {
  __m128i r;
  for (int i = 0; i < 4; ++i) r.v[i] = x.v[4 * at + i];
  return r;
}

}  // namespace avx512_model

// Parts of vectors. Casts to a shorter vector keep its low part; to a longer one what is above is undefined, here zero.
inline __m128i _mm_loadl_epi64(const __m128i* p) {
  __m128i r = {};
  std::memcpy(&r, static_cast<const void*>(p), 8);
  return r;
}
inline __m512i _mm512_castsi128_si512(__m128i x) {
  __m512i r = {};
  std::memcpy(&r, &x, sizeof(x));
  return r;
}
inline __m512i _mm512_inserti32x4(__m512i x, __m128i part, int at) {
  std::memcpy(x.v + 4 * at, &part, sizeof(part));
  return x;
}
inline __m256i _mm512_extracti64x4_epi64(__m512i x, int at) {
  __m256i r;
  std::memcpy(&r, x.v + 8 * at, sizeof(r));
  return r;
}
inline __m256i _mm512_castsi512_si256(__m512i x) { return _mm512_extracti64x4_epi64(x, 0); }
inline __m128i _mm256_extracti128_si256(__m256i x, int at) {
  __m128i r;
  std::memcpy(&r, x.v + 4 * at, sizeof(r));
  return r;
}
inline __m128i _mm256_castsi256_si128(__m256i x) { return _mm256_extracti128_si256(x, 0); }
// VSHUFI32X4: two quarters of x below two of y.
inline __m512i _mm512_shuffle_i32x4(__m512i x, __m512i y, int which) {
  __m512i r = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i) {
    const int at = which >> (2 * i) & 3;
    r = _mm512_inserti32x4(r, avx512_model::quarter(i < 2 ? x : y, at), i);
  }
  return r;
}

inline __m128i _mm_unpacklo_epi16(__m128i a, __m128i b) { return avx512_model::unpack<uint16_t>(a, b, false); }
inline __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return avx512_model::unpack<uint8_t>(a, b, false); }
inline __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return avx512_model::unpack<uint8_t>(a, b, true); }
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return avx512_model::unpack<uint32_t>(a, b, false); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return avx512_model::unpack<uint32_t>(a, b, true); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return avx512_model::unpack<uint64_t>(a, b, false); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return avx512_model::unpack<uint64_t>(a, b, true); }

// VPTERNLOG: bit 4a + 2b + c of `table` for each bit.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  for (int i = 0; i < 16; ++i) {
    uint32_t lane = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const int index = (a.v[i] >> bit & 1) * 4 + (b.v[i] >> bit & 1) * 2 + (c.v[i] >> bit & 1);
      lane |= uint32_t(table >> index & 1) << bit;
    }
    a.v[i] = int32_t(lane);
  }
  return a;
}

inline __m512i _mm512_srli_epi32(__m512i x, unsigned n) {
  return avx512_model::each<uint32_t>(x, x, [n](int, uint32_t a, uint32_t) { return n > 31 ? 0 : a >> n; });
}
inline __m512i _mm512_slli_epi64(__m512i x, unsigned n) {
  return avx512_model::each<uint64_t>(x, x, [n](int, uint64_t a, uint64_t) { return n > 63 ? 0 : a << n; });
}
inline uint64_t avx512_model_add(int, uint64_t a, uint64_t b) { return a + b; }
inline __m128i _mm_add_epi64(__m128i a, __m128i b) { return avx512_model::each<uint64_t>(a, b, avx512_model_add); }
inline __m256i _mm256_add_epi64(__m256i a, __m256i b) { return avx512_model::each<uint64_t>(a, b, avx512_model_add); }
inline __m512i _mm512_add_epi64(__m512i a, __m512i b) { return avx512_model::each<uint64_t>(a, b, avx512_model_add); }
inline __m512i _mm512_sub_epi64(__m512i a, __m512i b) {
  return avx512_model::each<uint64_t>(a, b, [](int, uint64_t x, uint64_t y) { return x - y; });
}
inline __m512i _mm512_mask_sub_epi64(__m512i kept, __mmask8 mask, __m512i a, __m512i b) {
  const __m512i difference = _mm512_sub_epi64(a, b);
  return avx512_model::each<uint64_t>(kept, difference, [mask](int i, uint64_t old, uint64_t now) {
    return mask >> i & 1 ? now : old;
  });
}
inline __mmask32 _mm512_cmpge_epi16_mask(__m512i x, __m512i y) {
  __mmask32 mask = 0;
  avx512_model::each<int16_t>(x, y, [&mask](int i, int16_t a, int16_t b) {
    mask |= uint32_t(a >= b) << i;
    return a;
  });
  return mask;
}

// VMOVNTDQ faults as the aligned forms do.
inline void _mm512_stream_si512(__m512i* p, __m512i x) { _mm512_store_si512(p, x); }
