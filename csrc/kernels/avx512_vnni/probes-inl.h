// Raw speed of multiplying on AVX-512 VNNI.

constexpr int kPeakChains = 12;
constexpr int64_t kPeakOperations = kPeakChains * 64 * 2;

// vpdpbusd alone: enough independent sums to hide its latency.
uint64_t peak(int64_t rounds) {
  __m512i sums[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm512_setzero_si512();
  const __m512i values = _mm512_set1_epi8(15);
  const __m512i x = _mm512_set1_epi8(char(rounds));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], values, x);
  }
  __m512i all = sums[0];
  for (int i = 1; i < kPeakChains; ++i) all = _mm512_add_epi32(all, sums[i]);
  return uint64_t(uint32_t(_mm512_reduce_add_epi32(all)));
}
