// The dense tiles on AVX-512: two vectors of 16 rows, one FMA per vector, token and input.
//
// bf16: 12 tokens take 24 sums, two vectors of weights and a broadcast: 27 of the 32 registers.
//   Bound: one 512-bit FMA per cycle on Zen 4 = 32 operations: 117 GFLOP/s at 3.67 GHz; two per cycle on Intel servers.
// int8: the two planes of A16 against unsigned weights, `vpdpbusd` for both into one sum: high plane, shift, low plane.
// Nothing is unpacked. Six tokens take 12 integer and 12 fp32 sums.
//   Bound: one vpdpbusd per cycle on Zen 4, halved by the two planes: 236 GOPS at 3.69 GHz.

constexpr int kBf16Tile = 12;

template <int T>
void bf16_tile(const DenseStep& step) {
  const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000));
  __m512 sums[2][T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    const float* out = step.output + t * step.output_stride;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      sums[half][t] = step.begins ? _mm512_setzero_ps() : _mm512_loadu_ps(out + 16 * half);
    }
  }
  const uint8_t* weights = step.weights;
  const uint8_t* input = step.input;
  for (int pair = 0; pair < step.groups * kDenseGroup / 2; ++pair, weights += 128, input += 2 * sizeof(float)) {
    const __m512i first = _mm512_load_si512(weights);
    const __m512i second = _mm512_load_si512(weights + 64);
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const __m512 w0 =
          _mm512_castsi512_ps(odd ? _mm512_and_si512(first, high) : _mm512_slli_epi32(first, 16));
      const __m512 w1 =
          _mm512_castsi512_ps(odd ? _mm512_and_si512(second, high) : _mm512_slli_epi32(second, 16));
#pragma GCC unroll 12
      for (int t = 0; t < T; ++t) {
        const float* x = reinterpret_cast<const float*>(input + t * step.input_stride) + odd;
        const __m512 value = _mm512_set1_ps(*x);
        sums[0][t] = _mm512_fmadd_ps(w0, value, sums[0][t]);
        sums[1][t] = _mm512_fmadd_ps(w1, value, sums[1][t]);
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    float* out = step.output + t * step.output_stride;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(out + 16 * half, sums[half][t]);
  }
}

constexpr DenseTile kBf16Tiles[kBf16Tile] = {bf16_tile<1>, bf16_tile<2>,  bf16_tile<3>,  bf16_tile<4>,
                                             bf16_tile<5>, bf16_tile<6>,  bf16_tile<7>,  bf16_tile<8>,
                                             bf16_tile<9>, bf16_tile<10>, bf16_tile<11>, bf16_tile<12>};

constexpr int kInt8Tile = 6;

struct Int8Group {
  int8_t plane[2][32];  // high, low
  int32_t exponent;
  int32_t correction;  // -128 * sum(n): takes back the +128 of the values
};

K2_INLINE void store_group(const FixedPoint& x, Int8Group* group) {
  const I32x16 high0 = shift_right<8>(add(x.n[0], i32(128)));
  const I32x16 high1 = shift_right<8>(add(x.n[1], i32(128)));
  store_i8(high0, group->plane[0]);
  store_i8(high1, group->plane[0] + 16);
  store_i8(sub(x.n[0], shift_left<8>(high0)), group->plane[1]);
  store_i8(sub(x.n[1], shift_left<8>(high1)), group->plane[1] + 16);
  group->exponent = x.exponent;
  group->correction = -128 * reduce_add(add(x.n[0], x.n[1]));
}

K2_INLINE __m512i broadcast4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm512_set1_epi32(four);
}

template <int T>
void int8_tile(const DenseStep& step) {
  const F32x16 unit = as_f32(i32((127 - kExponentBase) << 23));  // takes back the common factor of the exponents
  const Int8Group* x[T];
  __m512 totals[2][T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    x[t] = reinterpret_cast<const Int8Group*>(step.input + t * step.input_stride);
    const float* out = step.output + t * step.output_stride;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      totals[half][t] = step.begins ? _mm512_setzero_ps() : _mm512_loadu_ps(out + 16 * half);
    }
  }
  for (int g = 0; g < step.groups; ++g) {
    const uint8_t* block = step.weights + g * kInt8BlockBytes;
    __m512i dot[2][T];
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) dot[0][t] = dot[1][t] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int plane = 0; plane < 2; ++plane) {
      if (plane == 1) {
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
          const __m512i correction = _mm512_set1_epi32(x[t][g].correction);
          dot[0][t] = _mm512_add_epi32(_mm512_slli_epi32(dot[0][t], 8), correction);
          dot[1][t] = _mm512_add_epi32(_mm512_slli_epi32(dot[1][t], 8), correction);
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) {
        const __m512i first = _mm512_load_si512(block + kInt8ScaleBytes + q * 128);
        const __m512i second = _mm512_load_si512(block + kInt8ScaleBytes + q * 128 + 64);
#pragma GCC unroll 6
        for (int t = 0; t < T; ++t) {
          const __m512i n = broadcast4(x[t][g].plane[plane] + 4 * q);
          dot[0][t] = _mm512_dpbusd_epi32(dot[0][t], first, n);
          dot[1][t] = _mm512_dpbusd_epi32(dot[1][t], second, n);
        }
      }
    }
    const __m512i pairs = _mm512_load_si512(block);
    const __m512i scales[2] = {_mm512_slli_epi32(pairs, 16),
                               _mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000)))};
#pragma GCC unroll 12
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i factor = _mm512_add_epi32(scales[half], _mm512_set1_epi32(x[t][g].exponent));
        totals[half][t] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[half][t]), _mm512_castsi512_ps(factor), totals[half][t]);
      }
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
    float* out = step.output + t * step.output_stride;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      _mm512_storeu_ps(out + 16 * half, step.ends ? mul(totals[half][t], unit) : totals[half][t]);
    }
  }
}

constexpr DenseTile kInt8Tiles[kInt8Tile] = {int8_tile<1>, int8_tile<2>, int8_tile<3>,
                                             int8_tile<4>, int8_tile<5>, int8_tile<6>};
