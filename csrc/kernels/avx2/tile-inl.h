// The tile on AVX2: `vpmaddubsw` multiplies unsigned nibbles with the signed bytes of one plane and adds two
// neighbours.
//
// A group is 8 such products per lane and plane (4 vectors of values x 2 nibbles), each at most 2 * 15 * 128 = 3840 in
// magnitude, so all 8 add up in 16 bits (30720 < 32768): one `vpmaddwd` per group and plane widens the sum to 32 bits.
// Work goes in strips of 8 rows (one register of lanes): strips 0 and 1 are rows 0..15 of the block, 2 and 3
// rows 16..31. Per strip, group and token: 16 vpmaddubsw, 16 vpaddw, 16 broadcasts, about 10 for the sum; unpacking the
// values costs 12 per strip and group, shared by the tokens. Both planes are taken at once, so values are unpacked
// once.
//   Bound: two vpmaddubsw per cycle on Zen 3 = 128 operations, halved by the two planes: 207 GOPS at 3.24 GHz. With its
//   broadcast and addition, a product is 1.5 per cycle there: 158 GOPS.
//   Measured on a vCPU of that CPU, thread CPU time, cold weights: one token 22.8 GB/s = 93 % of the raw read, two 95
//   GOPS, six 113.

constexpr int kMaxTile = 6;  // 2 planes x 6 accumulators + values, mask and broadcast = the 16 registers
constexpr int kStreams = 4;  // address streams of a one-token call
constexpr int kPrefetchBytes = 9216;

// [half][token or stream]; half 0 = rows 0..15 of the row block.
template <int N>
struct Tile {
  F32x16 rows[2][N];
};

K2_INLINE __m256i load_values(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

K2_INLINE __m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

// Keeps a partial sum in its register at this point: left alone, gcc collects the products of a whole strip before it
// adds them, and spills them all.
K2_INLINE void pin(__m256i& sum) { __asm__("" : "+x"(sum)); }

// sum += values . x, for one plane of 8 inputs: `first` are the low nibbles, `second` the high ones.
K2_INLINE void add_products(__m256i& sum, __m256i first, __m256i second, __m256i x_first, __m256i x_second) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(first, x_first));
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(second, x_second));
  pin(sum);
}

K2_INLINE __m256i low_nibbles(__m256i values) { return _mm256_and_si256(values, _mm256_set1_epi8(15)); }
K2_INLINE __m256i high_nibbles(__m256i values) { return low_nibbles(_mm256_srli_epi16(values, 4)); }

// Scales of one strip.
K2_INLINE __m256i strip_scale(const uint8_t* block, int half, int part) {
  const __m256i pairs = load_values(block + part * 32);
  const __m128i shift = _mm_cvtsi32_si128(half == 0 ? 16 : 0);
  return _mm256_and_si256(_mm256_sll_epi32(pairs, shift), _mm256_set1_epi32(int32_t(0xffff0000)));
}

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

K2_INLINE void prefetch_block(const uint8_t* block) {
  for (int line = 0; line < kBlockBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(block) + kPrefetchBytes + line, _MM_HINT_T1);
  }
}

template <int T>
void tile(const uint8_t* weights, int groups, const A16Group* const (&input)[T], bool prefetch, Tile<T>& sums) {
  __m256 strips[4][T];
  for (int s = 0; s < 4; ++s) {
    for (int t = 0; t < T; ++t) strips[s][t] = _mm256_setzero_ps();
  }
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
    if (prefetch) prefetch_block(weights);
    add_block<T>(weights, input, g, strips);
  }
  for (int t = 0; t < T; ++t) {
    sums.rows[0][t] = {strips[0][t], strips[1][t]};
    sums.rows[1][t] = {strips[2][t], strips[3][t]};
  }
}

template <int S>
void tile_streams(const uint8_t* weights, ptrdiff_t distance, int groups, const A16Group* input, Tile<S>& sums) {
  __m256 strips[S][4];
  for (int s = 0; s < S; ++s) {
    for (int strip = 0; strip < 4; ++strip) strips[s][strip] = _mm256_setzero_ps();
  }
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
#pragma GCC unroll 1
    for (int s = 0; s < S; ++s) add_block_one(weights + s * distance, input[g], strips[s]);
  }
  for (int s = 0; s < S; ++s) {
    sums.rows[0][s] = {strips[s][0], strips[s][1]};
    sums.rows[1][s] = {strips[s][2], strips[s][3]};
  }
}
