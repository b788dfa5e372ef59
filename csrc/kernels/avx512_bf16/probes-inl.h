// Raw speed of multiplying on AVX-512 BF16.

constexpr int kPeakChains = 12;
constexpr int64_t kPeakOperations = kPeakChains * 32 * 2;

// vdpbf16ps alone: enough independent sums to hide its latency. They are variables of their own, because gcc keeps an
// array of them in memory, and start differently, because it makes one of equal ones.
uint64_t peak(int64_t rounds) {
  const __m512bh weights = as_bf16(nibble_table());
  const __m512bh x = as_bf16(_mm512_set1_epi32(int32_t(rounds & 0x3f803f80)));
  __m512 a = f32(0), b = f32(1), c = f32(2), d = f32(3), e = f32(4), f = f32(5);
  __m512 g = f32(6), h = f32(7), i = f32(8), j = f32(9), k = f32(10), l = f32(11);
  for (int64_t round = 0; round < rounds; ++round) {
    a = _mm512_dpbf16_ps(a, weights, x);
    b = _mm512_dpbf16_ps(b, weights, x);
    c = _mm512_dpbf16_ps(c, weights, x);
    d = _mm512_dpbf16_ps(d, weights, x);
    e = _mm512_dpbf16_ps(e, weights, x);
    f = _mm512_dpbf16_ps(f, weights, x);
    g = _mm512_dpbf16_ps(g, weights, x);
    h = _mm512_dpbf16_ps(h, weights, x);
    i = _mm512_dpbf16_ps(i, weights, x);
    j = _mm512_dpbf16_ps(j, weights, x);
    k = _mm512_dpbf16_ps(k, weights, x);
    l = _mm512_dpbf16_ps(l, weights, x);
  }
  const F32x16 first = add(add(add(a, b), add(c, d)), add(e, f));
  const F32x16 second = add(add(add(g, h), add(i, j)), add(k, l));
  return uint64_t(uint32_t(reduce_add(as_i32(add(first, second)))));
}
