// The peak of the instructions that the dense kernels multiply with, on AVX-512.

constexpr int kPeakChains = 12;  // two instructions of 4 or 5 cycles in flight per cycle

uint64_t peak_bf16(int64_t rounds) {
  __m512 sums[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm512_setzero_ps();
  const __m512 values = _mm512_set1_ps(0.5f), x = _mm512_set1_ps(float(rounds));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm512_fmadd_ps(values, x, sums[i]);
  }
  __m512 all = sums[0];
  for (int i = 1; i < kPeakChains; ++i) all = _mm512_add_ps(all, sums[i]);
  return uint64_t(uint32_t(_mm512_reduce_add_epi32(_mm512_castps_si512(all))));
}

// vpdpbusd, of which each product needs two: one per plane.
uint64_t peak_int8(int64_t rounds) {
  __m512i sums[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm512_setzero_si512();
  const __m512i values = _mm512_set1_epi8(15), x = _mm512_set1_epi8(char(rounds));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], values, x);
  }
  __m512i all = sums[0];
  for (int i = 1; i < kPeakChains; ++i) all = _mm512_add_epi32(all, sums[i]);
  return uint64_t(uint32_t(_mm512_reduce_add_epi32(all)));
}

constexpr DensePeak kBf16Peak = {peak_bf16, kPeakChains * 16 * 2};
constexpr DensePeak kInt8Peak = {peak_int8, kPeakChains * 64};
