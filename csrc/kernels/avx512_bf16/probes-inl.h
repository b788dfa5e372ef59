// Raw speed of multiplying on AVX-512 BF16.

constexpr int kPeakChains = 12;
constexpr int64_t kPeakOperations = kPeakChains * 32 * 2;

// vdpbf16ps alone: enough independent sums to hide its latency.
uint64_t peak(int64_t rounds) {
  __m512 sums[kPeakChains];
  for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm512_setzero_ps();
  const __m512bh weights = as_bf16(nibble_table());
  const __m512bh x = as_bf16(_mm512_set1_epi32(int32_t(rounds & 0x3f803f80)));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], weights, x);
  }
  __m512 all = sums[0];
  for (int i = 1; i < kPeakChains; ++i) all = _mm512_add_ps(all, sums[i]);
  return uint64_t(uint32_t(reduce_add(as_i32(all))));
}
