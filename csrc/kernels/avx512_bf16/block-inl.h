// One block of weights times hidden states on AVX-512 BF16: `vdpbf16ps` adds two products of bf16 numbers to a 32-bit
// lane; a lane is a row. Stands beside that of VNNI, which the down projection uses.
//
// A vector of nibbles becomes four vectors of bf16 weights by `vpermw` alone: the index is the 16-bit word, shifted by
// 0, 4, 8 and 12; only its low 5 bits count, and a table of 32 entries that repeats after 16 makes the fifth harmless.
//
// Registers of a tile of six tokens: 12 sums of the group, 12 of the row block, 2 vectors of nibbles, 2 of weights, the
// table and a broadcast pair of activations = 30 of 32. Per group and token: 32 vdpbf16ps and 16 broadcasts, then for each
// half an integer addition to the scale's exponent and an FMA.
//   Peak: one 512-bit vdpbf16ps per cycle on Zen 4 = 64 operations, the same as two planes of vpdpbusd.
// Measured on Emerald Rapids: a quarter of what two planes of vpdpbusd do there. Never on Zen 4.

// bf16(-8..7), twice.
alignas(64) constexpr uint16_t kNibbleAsBf16[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
};

K2_INLINE __m512i nibble_table() { return _mm512_load_si512(kNibbleAsBf16); }

// Pair i of 8 inputs, in the order of kWordOrder, as bf16 weights of 16 rows.
K2_INLINE __m512i weight_pair(__m512i values, int i, __m512i table) {
  return _mm512_permutexvar_epi16(i == 0 ? values : _mm512_srli_epi16(values, 4 * i), table);
}

K2_INLINE __m512bh as_bf16(__m512i x) { return __builtin_bit_cast(__m512bh, x); }
K2_INLINE __m512bh broadcast_pair(const uint16_t* x) {
  int32_t two;
  __builtin_memcpy(&two, x, sizeof(two));
  return as_bf16(_mm512_set1_epi32(two));
}

// 32 numbers that are exact in bf16, brought into the order of kWordOrder.
K2_INLINE __m512i to_pairs(__m512 first, __m512 second) {
  alignas(64) static constexpr uint16_t order[32] = {
      0,  2,  4,  6,  1,  3,  5,  7,  8,  10, 12, 14, 9,  11, 13, 15,
      16, 18, 20, 22, 17, 19, 21, 23, 24, 26, 28, 30, 25, 27, 29, 31,
  };
  const __m512i values = __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(second, first));
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), values);
}

template <>
struct Form<Bf16Group> {
  using Dot = __m512;
};

// total += dot * scale * 2^(k + 60): the one rounding.
K2_INLINE void add_group(__m512& total, __m512 dot, __m512i scale, const Bf16Group& group) {
  const __m512i factor = _mm512_add_epi32(scale, _mm512_set1_epi32(group.exponent));
  total = _mm512_fmadd_ps(dot, _mm512_castsi512_ps(factor), total);
}

// Products of one group. Few tokens take several chains per sum, because each step of a chain waits for the one before;
// the sums are exact, so it does not matter how they are split.
template <int N>
K2_INLINE void dot_block(const uint8_t* block, const Bf16Group* const (&x)[N], int g, int prefetch, __m512 (&dot)[2][N]) {
  constexpr int kChains = N == 1 ? 4 : N == 2 ? 2 : 1;
  const __m512i table = nibble_table();
  __m512 chain[2][N][kChains];
  for (int half = 0; half < 2; ++half) {
    for (int n = 0; n < N; ++n) {
      for (int c = 0; c < kChains; ++c) chain[half][n][c] = _mm512_setzero_ps();
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    prefetch_line(block, prefetch, 2 * q);
    prefetch_line(block, prefetch, 2 * q + 1);
    const __m512i values0 = _mm512_load_si512(block + kScaleBytes + q * 128);
    const __m512i values1 = _mm512_load_si512(block + kScaleBytes + q * 128 + 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512bh weights0 = as_bf16(weight_pair(values0, i, table));
      const __m512bh weights1 = as_bf16(weight_pair(values1, i, table));
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) {  // one broadcast for both halves: kept longer, it would be spilled
        const __m512bh pair = broadcast_pair(x[n][g].values + 8 * q + 2 * i);
        chain[0][n][i % kChains] = _mm512_dpbf16_ps(chain[0][n][i % kChains], weights0, pair);
        chain[1][n][i % kChains] = _mm512_dpbf16_ps(chain[1][n][i % kChains], weights1, pair);
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int n = 0; n < N; ++n) {
      dot[half][n] = chain[half][n][0];
      for (int c = 1; c < kChains; ++c) dot[half][n] = _mm512_add_ps(dot[half][n], chain[half][n][c]);
    }
  }
}
