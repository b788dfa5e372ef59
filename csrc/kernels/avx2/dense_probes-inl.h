// The peak of the instructions that the dense kernels multiply with, on AVX2.
//
// Sums are variables of their own, because gcc keeps an array of them in memory and the probe would measure stores; they
// start differently, because gcc makes one of equal ones.

template <class Step, class... Sums>
K2_INLINE void for_each_sum(Step step, Sums&... sums) {
  (step(sums), ...);
}

// Two FMAs of 4 cycles in flight per cycle.
uint64_t peak_bf16(int64_t rounds) {
  const __m256 values = _mm256_set1_ps(0.5f), x = _mm256_set1_ps(float(rounds));
  const auto start = [](int i) { return _mm256_set1_ps(float(i)); };
  __m256 a = start(0), b = start(1), c = start(2), d = start(3), e = start(4);
  __m256 f = start(5), g = start(6), h = start(7), i = start(8), j = start(9);
  const auto step = [&](__m256& sum) { sum = _mm256_fmadd_ps(values, x, sum); };
  for (int64_t round = 0; round < rounds; ++round) for_each_sum(step, a, b, c, d, e, f, g, h, i, j);
  for_each_sum([&](__m256 sum) { a = _mm256_add_ps(a, sum); }, b, c, d, e, f, g, h, i, j);
  return uint64_t(_mm256_extract_epi64(_mm256_castps_si256(a), 0));
}

// vpmaddwd of four inputs' even and odd ones, and the vpaddd that takes each product up: what the weights of a lane and
// a token cost at the least.
uint64_t peak_int8(int64_t rounds) {
  const __m256i values = _mm256_set1_epi16(255);
  const auto start = [](int i) { return _mm256_set1_epi32(i); };
  __m256i x = start(int(rounds));
  __m256i a = start(0), b = start(1), c = start(2), d = start(3), e = start(4), f = start(5), g = start(6), h = start(7);
  const auto step = [&](__m256i& sum) {
    pin(x);  // seen as new each time, or the product would be taken once for all rounds
    const __m256i even = _mm256_madd_epi16(values, x);
    pin(x);
    const __m256i odd = _mm256_madd_epi16(values, x);
    sum = _mm256_add_epi32(sum, even);
    pin(sum);
    sum = _mm256_add_epi32(sum, odd);
    pin(sum);
  };
  for (int64_t round = 0; round < rounds; ++round) for_each_sum(step, a, b, c, d, e, f, g, h);
  for_each_sum([&](__m256i sum) { a = _mm256_xor_si256(a, sum); }, b, c, d, e, f, g, h);
  return uint64_t(_mm256_extract_epi64(a, 0));
}

constexpr DensePeak kBf16Peak = {peak_bf16, 10 * 8 * 2};
constexpr DensePeak kInt8Peak = {peak_int8, 8 * 2 * 16 * 2};
