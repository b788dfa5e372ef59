// The tile on AVX-512 VNNI: `vpdpbusd` adds the products of four unsigned nibbles and four signed bytes of one plane to
// a 32-bit lane; a lane is a row.
//
// Registers of a tile of six tokens: 12 integer sums, 12 fp32 sums, 4 vectors of unpacked values, 1 mask = 29 of 32;
// the activations are broadcast by the instruction's memory operand. Per group and token: 32 vpdpbusd (16 per plane),
// then for each half a conversion, an integer addition to the scale's exponent and an FMA.
//   Peak: one 512-bit vpdpbusd per cycle on Zen 4 = 128 operations, halved by the two planes: 236 GOPS at 3.69 GHz.
//   Measured with the experiment that this follows (2 vCPU Zen 4): 200-210 GOPS per core at 3 and more tokens,
//   97 % of the raw read bandwidth at one token.
// Nibbles are unpacked by shift and mask: on Zen 4 these run beside the multiplications, GFNI and multishift do not.

constexpr int kMaxTile = 6;
constexpr int kStreams =
    4;  // address streams of a one-token call, hardware prefetch only: 97 % of raw against 83 % with one
// From two tokens on one stream is read, and prefetching this far ahead into L2 gains 30-45 %; T0 loses 8-30 %.
constexpr int kPrefetchBytes = 9216;

// [half][token or stream]; half 0 = rows 0..15 of the row block.
template <int N>
struct Tile {
  F32x16 rows[2][N];
};

// The values of 8 inputs for one half of the rows, unpacked.
struct Values {
  __m512i first, second;  // inputs 8q..8q+3 and 8q+4..8q+7
};

K2_INLINE Values load_values(const uint8_t* p) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i values = _mm512_load_si512(p);
  return {_mm512_and_si512(values, nibble), _mm512_and_si512(_mm512_srli_epi16(values, 4), nibble)};
}

K2_INLINE __m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm512_set1_epi32(four);
}

// sum += values . x, for one plane of 8 inputs.
K2_INLINE void add_products(__m512i& sum, const Values& values, const int8_t* x) {
  sum = _mm512_dpbusd_epi32(sum, values.first, broadcast4(x));
  sum = _mm512_dpbusd_epi32(sum, values.second, broadcast4(x + 4));
}

K2_INLINE __m512i strip_scale(__m512i pairs, int half) {
  return half == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000)));
}

// total += float(dot) * scale * 2^(k + 60): the one rounding.
K2_INLINE void add_group(__m512& total, __m512i dot, __m512i scale, int32_t exponent) {
  const __m512i factor = _mm512_add_epi32(scale, _mm512_set1_epi32(exponent));
  total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_castsi512_ps(factor), total);
}

// 256 * high + low + correction, both planes at once: independent chains, values unpacked once.
template <int N>
K2_INLINE void dot_planes(const uint8_t* block, const A16Group* const (&x)[N], int g, __m512i (&dot)[2][N]) {
  __m512i high[2][N];
  for (int n = 0; n < N; ++n) {
    high[0][n] = high[1][n] = _mm512_setzero_si512();
    dot[0][n] = dot[1][n] = _mm512_set1_epi32(x[n][g].correction);
  }
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Values values = load_values(block + kScaleBytes + q * 128 + half * 64);
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) {
        add_products(high[half][n], values, x[n][g].high + 8 * q);
        add_products(dot[half][n], values, x[n][g].low + 8 * q);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int half = 0; half < 2; ++half) {
      dot[half][n] = _mm512_add_epi32(_mm512_slli_epi32(high[half][n], 8), dot[half][n]);
    }
  }
}

// The same with one sum per token and half: high plane, shift, low plane. Values are unpacked twice, on free ports.
template <int N>
K2_INLINE void dot_in_turn(const uint8_t* block, const A16Group* const (&x)[N], int g, __m512i (&dot)[2][N]) {
  for (int n = 0; n < N; ++n) dot[0][n] = dot[1][n] = _mm512_setzero_si512();
#pragma GCC unroll 2
  for (int plane = 0; plane < 2; ++plane) {
    if (plane == 1) {
      for (int n = 0; n < N; ++n) {
        const __m512i correction = _mm512_set1_epi32(x[n][g].correction);
        dot[0][n] = _mm512_add_epi32(_mm512_slli_epi32(dot[0][n], 8), correction);
        dot[1][n] = _mm512_add_epi32(_mm512_slli_epi32(dot[1][n], 8), correction);
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const Values values0 = load_values(block + kScaleBytes + q * 128);
      const Values values1 = load_values(block + kScaleBytes + q * 128 + 64);
#pragma GCC unroll 6
      for (int n = 0; n < N; ++n) {
        const int8_t* p = (plane == 0 ? x[n][g].high : x[n][g].low) + 8 * q;
        add_products(dot[0][n], values0, p);
        add_products(dot[1][n], values1, p);
      }
    }
  }
}

K2_INLINE void prefetch_block(const uint8_t* block) {
  for (int line = 0; line < kBlockBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(block) + kPrefetchBytes + line, _MM_HINT_T1);
  }
}

template <int T>
void tile(const uint8_t* weights, int groups, const A16Group* const (&input)[T], bool prefetch, Tile<T>& sums) {
  __m512 totals[2][T];
  for (int t = 0; t < T; ++t) totals[0][t] = totals[1][t] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
    if (prefetch) prefetch_block(weights);
    __m512i dot[2][T];
    if constexpr (T <= 2) {
      dot_planes<T>(weights, input, g, dot);
    } else {
      dot_in_turn<T>(weights, input, g, dot);
    }
    const __m512i pairs = _mm512_load_si512(weights);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const int32_t exponent = input[t][g].exponent;
      add_group(totals[0][t], dot[0][t], strip_scale(pairs, 0), exponent);
      add_group(totals[1][t], dot[1][t], strip_scale(pairs, 1), exponent);
    }
  }
  for (int t = 0; t < T; ++t) {
    sums.rows[0][t] = totals[0][t];
    sums.rows[1][t] = totals[1][t];
  }
}

template <int S>
void tile_streams(const uint8_t* weights, ptrdiff_t distance, int groups, const A16Group* input, Tile<S>& sums) {
  const A16Group* const x[1] = {input};
  __m512 totals[S][2];
  for (int s = 0; s < S; ++s) totals[s][0] = totals[s][1] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const uint8_t* block = weights + s * distance;
      __m512i dot[2][1];
      dot_planes<1>(block, x, g, dot);
      const __m512i pairs = _mm512_load_si512(block);
      add_group(totals[s][0], dot[0][0], strip_scale(pairs, 0), input[g].exponent);
      add_group(totals[s][1], dot[1][0], strip_scale(pairs, 1), input[g].exponent);
    }
  }
  for (int s = 0; s < S; ++s) {
    sums.rows[0][s] = totals[s][0];
    sums.rows[1][s] = totals[s][1];
  }
}
