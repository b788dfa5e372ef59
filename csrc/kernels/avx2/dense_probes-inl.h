// The peak of the instructions that the dense kernels multiply with, on AVX2.

constexpr int kPeakChains = 10;  // two instructions of 4 or 5 cycles in flight per cycle

uint64_t peak_bf16(int64_t rounds) {
  __m256 sums[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm256_setzero_ps();
  const __m256 values = _mm256_set1_ps(0.5f), x = _mm256_set1_ps(float(rounds));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm256_fmadd_ps(values, x, sums[i]);
  }
  __m256 all = sums[0];
  for (int i = 1; i < kPeakChains; ++i) all = _mm256_add_ps(all, sums[i]);
  return uint64_t(_mm256_extract_epi64(_mm256_castps_si256(all), 0));
}

// vpmaddwd and the vpaddd that takes its products up.
uint64_t peak_int8(int64_t rounds) {
  __m256i sums[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm256_setzero_si256();
  const __m256i values = _mm256_set1_epi16(255);
  __m256i x = _mm256_set1_epi32(int32_t(rounds));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 10
    for (int i = 0; i < kPeakChains; ++i) {
      __asm__("" : "+x"(x));  // seen as new each time, or the product would be taken once for all rounds
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(values, x));
      __asm__("" : "+x"(sums[i]));
    }
  }
  __m256i all = sums[0];
  for (int i = 1; i < kPeakChains; ++i) all = _mm256_xor_si256(all, sums[i]);
  return uint64_t(_mm256_extract_epi64(all, 0));
}

constexpr DensePeak kBf16Peak = {peak_bf16, kPeakChains * 8 * 2};
constexpr DensePeak kInt8Peak = {peak_int8, kPeakChains * 16 * 2};
