// Weights and activations as AVX2 multiplies bytes: `vpmaddubsw` takes unsigned nibbles and the signed bytes of one plane
// and adds two neighbours.
//
// A group is 8 such products per lane and plane (4 vectors of values x 2 nibbles), each at most 2 * 15 * 128 = 3840 in
// magnitude, so all 8 add up in 16 bits (30720 < 32768): one `vpmaddwd` per group and plane widens the sum to 32 bits.
// Work goes in strips of 8 rows (one register of lanes): strips 0 and 1 are rows 0..15 of the block, 2 and 3
// rows 16..31.

K2_INLINE __m256i load_values(const uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

K2_INLINE __m256i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

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
