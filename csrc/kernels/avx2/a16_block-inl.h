// One block of weights times A16 activations on AVX2.
//
// Several tokens are multiplied as 16-bit words (A16Words): a `vpmaddwd` does as much as one `vpmaddubsw` for each plane,
// two inputs of both planes instead of four of one, but its sums need no second plane, no widening and half of the
// registers. 16 rows fit them at once: 2 strips x 6 tokens = 12 sums, 2 vectors of weights, 1 broadcast, 1 product. Two
// strips share each broadcast. Per half, group and token: 32 vpmaddwd, 32 vpaddd, 16 broadcasts and 8 for the two sums;
// unpacking the values costs 48 per half and group, shared by the tokens.
//   Bound: two vpmaddwd per cycle on Zen 3 = 64 operations: 207 GOPS at 3.24 GHz; with the addition that each needs, 165.
//   Measured on a vCPU of that CPU, thread CPU time, weights in the L3 cache: 2, 3, 4, 6 and 36 tokens 112, 124, 129, 130
//   and 128 GOPS. By planes, one strip after the other: 95, 99, 105, 112 and 110.
//
// One token shares no unpacking, of which the planes need half: its groups are split into planes first. From memory it
// reads 93 % of what one core can.

// total += float(dot) * scale * 2^(k + 60): the one rounding.
K2_INLINE void add_group(__m256& total, __m256i dot, const A16Words& group, __m256i scale) {
  const __m256i factor = _mm256_add_epi32(scale, _mm256_set1_epi32(group.exponent));
  total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_castsi256_ps(factor), total);
}

// Multiplications and additions of one product.
constexpr int kProductOperations = 32;

// sum += weights . n, for 2 inputs of 8 rows.
K2_INLINE void add_product(__m256i& sum, __m256i weights, __m256i n) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(weights, n));
  pin(sum);
}

// Pair i of 8 inputs, in the order of kWordOrder, as words.
template <int Pair>
K2_INLINE __m256i weight_pair(const uint8_t* p) {
  const __m256i values = load_values(p);
  if (Pair == 3) return _mm256_srli_epi16(values, 12);
  return _mm256_and_si256(Pair == 0 ? values : _mm256_srli_epi16(values, 4 * Pair), _mm256_set1_epi16(15));
}

// 2 inputs of 16 rows times N tokens.
template <int Pair, int N>
K2_INLINE void add_step(const uint8_t* values, int q, const A16Words* const (&x)[N], int g, __m256i (&sums)[2][N]) {
  const __m256i first = weight_pair<Pair>(values);
  const __m256i second = weight_pair<Pair>(values + 32);
#pragma GCC unroll 6
  for (int t = 0; t < N; ++t) {
    const __m256i n = broadcast_pair(x[t][g].n + 8 * q + 2 * Pair);
    add_product(sums[0][t], first, n);
    add_product(sums[1][t], second, n);
  }
}

// Adds one block for N tokens, 16 rows after 16 rows.
template <int N>
K2_INLINE void add_block(const uint8_t* block, const A16Words* const (&x)[N], int g, __m256 (&totals)[4][N]) {
#pragma GCC unroll 1
  for (int half = 0; half < 2; ++half) {
    __asm__ volatile("" ::: "memory");  // broadcasts are loaded anew: hoisted out of this loop, they spill
    __m256i sums[2][N];
#pragma GCC unroll 6
    for (int t = 0; t < N; ++t) sums[0][t] = sums[1][t] = _mm256_set1_epi32(x[t][g].correction);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const uint8_t* values = block + kScaleBytes + q * 128 + half * 64;
      add_step<0, N>(values, q, x, g, sums);
      add_step<1, N>(values, q, x, g, sums);
      add_step<2, N>(values, q, x, g, sums);
      add_step<3, N>(values, q, x, g, sums);
    }
    for (int part = 0; part < 2; ++part) {
      const __m256i scale = strip_scale(block, half, part);
#pragma GCC unroll 6
      for (int t = 0; t < N; ++t) add_group(totals[2 * half + part][t], sums[part][t], x[t][g], scale);
    }
  }
}

// One token's group in planes.
struct OneGroup {
  alignas(32) int8_t planes[64];  // of every 8 inputs: high of the first four, high of the others, low of both
  const A16Words* group;
};

// n = 256 * high + low: low is n's lower byte as it is, which high makes up for where that byte is negative.
K2_INLINE OneGroup one_token(const A16Words& group) {
  const __m256i order = _mm256_setr_epi8(1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14,  //
                                         1, 9, 3, 11, 5, 13, 7, 15, 0, 8, 2, 10, 4, 12, 6, 14);
  OneGroup one;
  for (int i = 0; i < 2; ++i) {
    const __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group.n + 16 * i));
    const __m256i high = _mm256_and_si256(_mm256_add_epi16(n, _mm256_set1_epi16(128)), _mm256_set1_epi16(-256));
    const __m256i both = _mm256_or_si256(high, _mm256_and_si256(n, _mm256_set1_epi16(255)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(one.planes + 32 * i), _mm256_shuffle_epi8(both, order));
  }
  one.group = &group;
  return one;
}

// Adds one block for one token, all strips at once: they share the broadcasts.
K2_INLINE void add_block_one(const uint8_t* block, const OneGroup& x, __m256 (&totals)[4]) {
  __m256i high[4], low[4];
  for (int s = 0; s < 4; ++s) high[s] = low[s] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const int8_t* p = x.planes + 16 * q;
    const __m256i high_first = broadcast4(p), high_second = broadcast4(p + 4);
    const __m256i low_first = broadcast4(p + 8), low_second = broadcast4(p + 12);
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
  for (int s = 0; s < 4; ++s) {
    const __m256i both = _mm256_add_epi32(_mm256_madd_epi16(high[s], _mm256_set1_epi16(256)),
                                          _mm256_madd_epi16(low[s], _mm256_set1_epi16(1)));
    const __m256i dot = _mm256_add_epi32(both, _mm256_set1_epi32(x.group->correction));
    add_group(totals[s], dot, *x.group, strip_scale(block, s / 2, s % 2));
  }
}
