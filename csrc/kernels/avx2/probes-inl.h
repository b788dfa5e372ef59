// Raw speed on AVX2: what reading and what multiplying cost with nothing else around them.

uint64_t read(const uint8_t* memory, size_t bytes) {
  // Four address streams: each runs through its quarter in order.
  const size_t quarter = bytes / 4;
  __m256i sums[4] = {};
  for (size_t i = 0; i < quarter; i += 64) {
    for (int s = 0; s < 4; ++s) {
      const uint8_t* p = memory + s * quarter + i;
      sums[s] = _mm256_xor_si256(sums[s], _mm256_xor_si256(load_values(p), load_values(p + 32)));
    }
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
  return uint64_t(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 1) ^ _mm256_extract_epi64(all, 2) ^
                  _mm256_extract_epi64(all, 3));
}

constexpr int kPeakChains = 8;
constexpr int64_t kPeakOperations = kPeakChains * kProductOperations;

K2_INLINE void peak_step(__m256i& sum, __m256i values, __m256i& x) {
  pin(x);  // seen as new each time, or the product would be taken once for all rounds
  add_product(sum, values, x);
}

// The instruction that multiplies and the addition that takes its products up: what the numerics cost at the least. The
// sums are variables of their own, because gcc keeps an array of them in memory.
uint64_t peak(int64_t rounds) {
  const __m256i values = _mm256_set1_epi8(15);
  __m256i x = _mm256_set1_epi8(char(rounds));
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
  for (int64_t round = 0; round < rounds; ++round) {
    peak_step(a, values, x);
    peak_step(b, values, x);
    peak_step(c, values, x);
    peak_step(d, values, x);
    peak_step(e, values, x);
    peak_step(f, values, x);
    peak_step(g, values, x);
    peak_step(h, values, x);
  }
  const __m256i first = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
  const __m256i second = _mm256_xor_si256(_mm256_xor_si256(e, f), _mm256_xor_si256(g, h));
  return uint64_t(_mm256_extract_epi64(_mm256_xor_si256(first, second), 0));
}
