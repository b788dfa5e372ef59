// The A8 tile on AVX2, beside the A16 tile, whose vectors of values it uses.
//
// The 16-bit sums hold as there: 8 products of at most 2 * 15 * 127 = 3810 per lane and group. With one plane, 16 rows fit
// the registers at once: 2 strips x 6 tokens = 12 sums, 2 vectors of values, 1 broadcast and 1 product = 16; the mask is
// read from memory. Two strips share each broadcast. Per half, group and token: 16 vpmaddubsw, 16 vpaddw, 8 broadcasts and
// about 10 instructions for the two sums.

// total += float(dot) * (scale * factor).
K2_INLINE void add_group(__m256& total, __m256i words, const A8Group& group, __m256i scale) {
  const __m256i pairs = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
  const __m256i dot = _mm256_add_epi32(pairs, _mm256_set1_epi32(group.correction));
  const __m256 both = _mm256_mul_ps(_mm256_castsi256_ps(scale), _mm256_set1_ps(group.factor));
  total = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), both, total);
}

// Multiplications and additions of one product.
constexpr int kProductOperations = 64;

// sum += values . x, for 4 inputs of 8 rows.
K2_INLINE void add_product(__m256i& sum, __m256i values, __m256i x) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(values, x));
  pin(sum);
}

template <int High>
K2_INLINE __m256i nibbles(const uint8_t* p) {
  return High ? high_nibbles(load_values(p)) : low_nibbles(load_values(p));
}

// 4 inputs of 16 rows times N tokens: inputs 8q + 4 * High.
template <int High, int N>
K2_INLINE void add_step(const uint8_t* values, int q, const A8Group* const (&x)[N], int g, __m256i (&sums)[2][N]) {
  const __m256i first = nibbles<High>(values);
  const __m256i second = nibbles<High>(values + 32);
#pragma GCC unroll 6
  for (int n = 0; n < N; ++n) {
    const __m256i four = broadcast4(x[n][g].values + 8 * q + 4 * High);
    add_product(sums[0][n], first, four);
    add_product(sums[1][n], second, four);
  }
}

// Adds one block for N tokens, 16 rows after 16 rows.
template <int N>
K2_INLINE void add_block(const uint8_t* block, const A8Group* const (&x)[N], int g, __m256 (&totals)[4][N]) {
#pragma GCC unroll 1
  for (int half = 0; half < 2; ++half) {
    __asm__ volatile("" ::: "memory");  // broadcasts are loaded anew: hoisted out of this loop, they spill
    __m256i sums[2][N];
    for (int n = 0; n < N; ++n) sums[0][n] = sums[1][n] = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const uint8_t* values = block + kScaleBytes + q * 128 + half * 64;
      add_step<0, N>(values, q, x, g, sums);
      add_step<1, N>(values, q, x, g, sums);
    }
    for (int part = 0; part < 2; ++part) {
      const __m256i scale = strip_scale(block, half, part);
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) add_group(totals[2 * half + part][n], sums[part][n], x[n][g], scale);
    }
  }
}

// One token's group, as it is.
K2_INLINE const A8Group* one_token(const A8Group& group) { return &group; }

// Adds one block for one token, all 32 rows at once: they share the broadcasts.
K2_INLINE void add_block_one(const uint8_t* block, const A8Group* x, __m256 (&totals)[4]) {
  const A8Group& group = *x;
  __m256i sums[4];
  for (int s = 0; s < 4; ++s) sums[s] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m256i x_first = broadcast4(group.values + 8 * q), x_second = broadcast4(group.values + 8 * q + 4);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const __m256i values = load_values(block + kScaleBytes + q * 128 + s * 32);
      add_products(sums[s], low_nibbles(values), high_nibbles(values), x_first, x_second);
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) add_group(totals[s], sums[s], group, strip_scale(block, s / 2, s % 2));
}
