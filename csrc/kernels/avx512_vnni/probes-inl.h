// Raw speed of multiplying on AVX-512 VNNI.

constexpr int kPeakChains = 12;
constexpr int64_t kPeakOperations = kPeakChains * 64 * 2;

K2_INLINE void peak_step(__m512i& sum, __m512i values, __m512i x) {
  sum = _mm512_dpbusd_epi32(sum, values, x);
  pin(sum);
}

// vpdpbusd alone: enough independent sums to hide its latency. They are variables of their own, because gcc keeps an
// array of them in memory, and start differently, because it makes one of equal ones.
uint64_t peak(int64_t rounds) {
  const __m512i values = _mm512_set1_epi8(15);
  const __m512i x = _mm512_set1_epi8(char(rounds));
  __m512i a = i32(0), b = i32(1), c = i32(2), d = i32(3), e = i32(4), f = i32(5);
  __m512i g = i32(6), h = i32(7), i = i32(8), j = i32(9), k = i32(10), l = i32(11);
  for (int64_t round = 0; round < rounds; ++round) {
    peak_step(a, values, x);
    peak_step(b, values, x);
    peak_step(c, values, x);
    peak_step(d, values, x);
    peak_step(e, values, x);
    peak_step(f, values, x);
    peak_step(g, values, x);
    peak_step(h, values, x);
    peak_step(i, values, x);
    peak_step(j, values, x);
    peak_step(k, values, x);
    peak_step(l, values, x);
  }
  const I32x16 first = add(add(add(a, b), add(c, d)), add(e, f));
  const I32x16 second = add(add(add(g, h), add(i, j)), add(k, l));
  return uint64_t(uint32_t(reduce_add(add(first, second))));
}
