// The peak of the instructions that the dense kernels multiply with, on AVX-512.
//
// Sums are variables of their own, because gcc keeps an array of them in memory and the probe would measure stores; they
// start differently, because gcc makes one of equal ones. Twelve hide two instructions of 4 or 5 cycles per cycle.

template <class Step, class... Sums>
K2_INLINE void for_each_sum(Step step, Sums&... sums) {
  (step(sums), ...);
}

uint64_t peak_bf16(int64_t rounds) {
  const __m512 values = _mm512_set1_ps(0.5f), x = _mm512_set1_ps(float(rounds));
  const auto start = [](int i) { return _mm512_set1_ps(float(i)); };
  __m512 a = start(0), b = start(1), c = start(2), d = start(3), e = start(4), f = start(5);
  __m512 g = start(6), h = start(7), i = start(8), j = start(9), k = start(10), l = start(11);
  const auto step = [&](__m512& sum) { sum = _mm512_fmadd_ps(values, x, sum); };
  for (int64_t round = 0; round < rounds; ++round) for_each_sum(step, a, b, c, d, e, f, g, h, i, j, k, l);
  for_each_sum([&](__m512 sum) { a = _mm512_add_ps(a, sum); }, b, c, d, e, f, g, h, i, j, k, l);
  return uint64_t(uint32_t(_mm512_reduce_add_epi32(_mm512_castps_si512(a))));
}

// vpdpbusd, of which each product needs two: one per plane.
uint64_t peak_int8(int64_t rounds) {
  const __m512i values = _mm512_set1_epi8(15), x = _mm512_set1_epi8(char(rounds));
  const auto start = [](int i) { return _mm512_set1_epi32(i); };
  __m512i a = start(0), b = start(1), c = start(2), d = start(3), e = start(4), f = start(5);
  __m512i g = start(6), h = start(7), i = start(8), j = start(9), k = start(10), l = start(11);
  const auto step = [&](__m512i& sum) {
    sum = _mm512_dpbusd_epi32(sum, values, x);
    pin(sum);
  };
  for (int64_t round = 0; round < rounds; ++round) for_each_sum(step, a, b, c, d, e, f, g, h, i, j, k, l);
  for_each_sum([&](__m512i sum) { a = _mm512_add_epi32(a, sum); }, b, c, d, e, f, g, h, i, j, k, l);
  return uint64_t(uint32_t(_mm512_reduce_add_epi32(a)));
}

constexpr DensePeak kBf16Peak = {peak_bf16, 12 * 16 * 2};
constexpr DensePeak kInt8Peak = {peak_int8, 12 * 64};
