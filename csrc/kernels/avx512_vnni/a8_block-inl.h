// One block of weights times A8 activations on AVX-512 VNNI.
//
// Registers of a tile of six tokens: as for A16, 30 of 32. Per group and token: 16 vpdpbusd, then for each half a
// conversion, the product of the two scales and an FMA.
//   Peak: one 512-bit vpdpbusd per cycle on Zen 4 = 128 operations: 472 GOPS at 3.69 GHz. Products and FMAs of the scales
//   run on the same pipes, so that at most 16 of 20 are left.
//   Measured with the experiment that this follows (2 vCPU Zen 4): 345-355 GOPS per core at 4 and more tokens, 94 to 98 %
//   of the raw read bandwidth at one token. This text has not run on such a CPU.

// total += float(dot) * (scale * factor).
K2_INLINE void add_group(__m512& total, __m512i dot, __m512i scale, const A8Group& group) {
  const __m512 both = _mm512_mul_ps(_mm512_castsi512_ps(scale), _mm512_set1_ps(group.factor));
  total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, total);
}

// Products of one group. One and two tokens take two chains per sum, because each step of a chain waits for the one
// before.
template <int N>
K2_INLINE void dot_block(const uint8_t* block, const A8Group* const (&x)[N], int g, int prefetch, __m512i (&dot)[2][N]) {
  constexpr int kChains = N <= 2 ? 2 : 1;
  __m512i chains[kChains][2][N];
  for (int n = 0; n < N; ++n) {
    chains[0][0][n] = chains[0][1][n] = _mm512_set1_epi32(x[n][g].correction);
    for (int c = 1; c < kChains; ++c) chains[c][0][n] = chains[c][1][n] = _mm512_setzero_si512();
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    prefetch_line(block, prefetch, 2 * q);
    prefetch_line(block, prefetch, 2 * q + 1);
    const Values values0 = load_values(block + kScaleBytes + q * 128);
    const Values values1 = load_values(block + kScaleBytes + q * 128 + 64);
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) {
      const int8_t* p = x[n][g].values + 8 * q;
      add_products(chains[q % kChains][0][n], values0, p);
      add_products(chains[q % kChains][1][n], values1, p);
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int half = 0; half < 2; ++half) {
      dot[half][n] = chains[0][half][n];
      for (int c = 1; c < kChains; ++c) dot[half][n] = _mm512_add_epi32(dot[half][n], chains[c][half][n]);
    }
  }
}
