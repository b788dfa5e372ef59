// One block of weights times A16 activations on AVX-512 VNNI.
//
// Registers of a tile of six tokens: 12 integer sums, 12 fp32 sums, 4 vectors of unpacked values, 1 mask, 1 broadcast of
// activations = 30 of 32. Per group and token: 32 vpdpbusd (16 per plane) and 16 broadcasts, which serve both halves, then
// for each half a conversion, an integer addition to the scale's exponent and an FMA.
//   Peak: one 512-bit vpdpbusd per cycle on Zen 4 = 128 operations, halved by the two planes: 236 GOPS at 3.69 GHz.
//   Measured with the experiment that this follows (2 vCPU Zen 4): 200-210 GOPS per core at 3 and more tokens,
//   97 % of the raw read bandwidth at one token.

// total += float(dot) * scale * 2^(k + 60): the one rounding.
K2_INLINE void add_group(__m512& total, __m512i dot, __m512i scale, const A16Group& group) {
  const __m512i factor = _mm512_add_epi32(scale, _mm512_set1_epi32(group.exponent));
  total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_castsi512_ps(factor), total);
}

// 256 * high + low + correction, both planes at once: independent chains, values unpacked once. Four tokens take 24 of
// the 32 registers for sums.
template <int N>
K2_INLINE void dot_planes(const uint8_t* block, const A16Group* const (&x)[N], int g, int prefetch, __m512i (&dot)[2][N]) {
  __m512i high[2][N];
  for (int n = 0; n < N; ++n) {
    high[0][n] = high[1][n] = _mm512_setzero_si512();
    dot[0][n] = dot[1][n] = _mm512_set1_epi32(x[n][g].correction);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      prefetch_line(block, prefetch, 2 * q + half);
      const Values values = load_values(block + kScaleBytes + q * 128 + half * 64);
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) {
        add_products(high[half][n], values, x[n][g].high + 8 * q);
        add_products(dot[half][n], values, x[n][g].low + 8 * q);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int half = 0; half < 2; ++half) {
      dot[half][n] = _mm512_add_epi32(_mm512_slli_epi32(high[half][n], 8), dot[half][n]);
    }
  }
}

// The same with one sum per token and half: high plane, shift, low plane. Values are unpacked twice, on free ports.
template <int N>
K2_INLINE void dot_in_turn(const uint8_t* block, const A16Group* const (&x)[N], int g, int prefetch, __m512i (&dot)[2][N]) {
  for (int n = 0; n < N; ++n) dot[0][n] = dot[1][n] = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int plane = 0; plane < 2; ++plane) {
    if (plane == 1) {
      for (int n = 0; n < N; ++n) {
        const __m512i correction = _mm512_set1_epi32(x[n][g].correction);
        dot[0][n] = _mm512_add_epi32(_mm512_slli_epi32(dot[0][n], 8), correction);
        dot[1][n] = _mm512_add_epi32(_mm512_slli_epi32(dot[1][n], 8), correction);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      prefetch_line(block, prefetch, 4 * plane + q);
      const Values values0 = load_values(block + kScaleBytes + q * 128);
      const Values values1 = load_values(block + kScaleBytes + q * 128 + 64);
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) {
        const int8_t* p = (plane == 0 ? x[n][g].high : x[n][g].low) + 8 * q;
        add_products(dot[0][n], values0, p);
        add_products(dot[1][n], values1, p);
      }
    }
  }
}

// Products of one group.
template <int N>
K2_INLINE void dot_block(const uint8_t* block, const A16Group* const (&x)[N], int g, int prefetch, __m512i (&dot)[2][N]) {
  if constexpr (N <= 4) {
    dot_planes<N>(block, x, g, prefetch, dot);
  } else {
    dot_in_turn<N>(block, x, g, prefetch, dot);
  }
}
