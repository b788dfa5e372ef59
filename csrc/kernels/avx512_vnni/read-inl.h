// Reading memory on AVX-512 with nothing else around it.
uint64_t read(const uint8_t* memory, size_t bytes) {
  // Four address streams: each runs through its quarter in order.
  const size_t quarter = bytes / 4;
  __m512i sums[4];
  for (int s = 0; s < 4; ++s) sums[s] = _mm512_setzero_si512();
  for (size_t i = 0; i < quarter; i += 64) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sums[s] = _mm512_add_epi32(sums[s], _mm512_load_si512(memory + s * quarter + i));
  }
  const __m512i all = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
  return uint64_t(uint32_t(_mm512_reduce_add_epi32(all)));
}
