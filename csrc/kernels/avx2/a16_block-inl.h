// One block of weights times A16 activations on AVX2.
//
// Per strip, group and token: 16 vpmaddubsw, 16 vpaddw, 16 broadcasts, about 10 for the sum; unpacking the values costs 12
// per strip and group, shared by the tokens. Both planes are taken at once, so values are unpacked once: 2 planes x 6
// accumulators + values, mask and broadcast = the 16 registers.
//   Bound: two vpmaddubsw per cycle on Zen 3 = 128 operations, halved by the two planes: 207 GOPS at 3.24 GHz. With its
//   broadcast and addition, a product is 1.5 per cycle there: 158 GOPS.
//   Measured on a vCPU of that CPU, thread CPU time, cold weights: one token 22.8 GB/s = 93 % of the raw read, two 95
//   GOPS, six 113.

// total += float(256 * high + low + correction) * scale * 2^(k + 60): the one rounding.
K2_INLINE void add_group(__m256& total, __m256i high, __m256i low, const A16Group& group, __m256i scale) {
  __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(high, _mm256_set1_epi16(256)), _mm256_set1_epi32(group.correction));
  dot = _mm256_add_epi32(dot, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
  const __m256i factor = _mm256_add_epi32(scale, _mm256_set1_epi32(group.exponent));
  total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_castsi256_ps(factor), total);
}

// Adds one block for N tokens, strip after strip: a strip's values are unpacked once for all tokens.
template <int N>
K2_INLINE void add_block(const uint8_t* block, const A16Group* const (&x)[N], int g, __m256 (&totals)[4][N]) {
#pragma GCC unroll 1
  for (int strip = 0; strip < 4; ++strip) {
    __asm__ volatile("" ::: "memory");  // broadcasts are loaded anew: hoisted out of this loop, they spill
    const int half = strip / 2;
    const int part = strip % 2;
    const uint8_t* strip_values = block + kScaleBytes + half * 64 + part * 32;
    __m256i high[N], low[N];
    for (int n = 0; n < N; ++n) high[n] = low[n] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const __m256i values = load_values(strip_values + q * 128);
      const __m256i first = low_nibbles(values);
      const __m256i second = high_nibbles(values);
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) {
        const int8_t* h = x[n][g].high + 8 * q;
        const int8_t* l = x[n][g].low + 8 * q;
        add_products(high[n], first, second, broadcast4(h), broadcast4(h + 4));
        add_products(low[n], first, second, broadcast4(l), broadcast4(l + 4));
      }
    }
    const __m256i scale = strip_scale(block, half, part);
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) add_group(totals[strip][n], high[n], low[n], x[n][g], scale);
  }
}

// Adds one block for one token, all strips at once: they share the broadcasts.
K2_INLINE void add_block_one(const uint8_t* block, const A16Group& group, __m256 (&totals)[4]) {
  __m256i high[4], low[4];
  for (int s = 0; s < 4; ++s) high[s] = low[s] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m256i high_first = broadcast4(group.high + 8 * q), high_second = broadcast4(group.high + 8 * q + 4);
    const __m256i low_first = broadcast4(group.low + 8 * q), low_second = broadcast4(group.low + 8 * q + 4);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const __m256i values = load_values(block + kScaleBytes + q * 128 + s * 32);
      const __m256i first = low_nibbles(values);
      const __m256i second = high_nibbles(values);
      add_products(high[s], first, second, high_first, high_second);
      add_products(low[s], first, second, low_first, low_second);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) add_group(totals[s], high[s], low[s], group, strip_scale(block, s / 2, s % 2));
}
