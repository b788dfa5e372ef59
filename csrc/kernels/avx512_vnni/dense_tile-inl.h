// The dense tiles on AVX-512: two vectors of 16 rows, one FMA per vector, token and input.
//
// bf16: 12 tokens take 24 sums, two vectors of weights and a broadcast: 27 of the 32 registers.
//   Bound: one 512-bit FMA per cycle on Zen 4 = 32 operations: 117 GFLOP/s at 3.67 GHz; two per cycle on Intel servers.
//   Widening takes two instructions of the same ports for each vector of weights: 12 tokens leave 92 % of that.
// int8: the two planes of A16 against unsigned weights, `vpdpbusd` for both into one sum: high plane, shift, low plane.
// Nothing is unpacked. Eight tokens take 16 sums.
//   Bound: one vpdpbusd per cycle on Zen 4, halved by the two planes: 236 GOPS at 3.69 GHz; two per cycle on Intel
//   servers, where the five instructions that add a group's result to the sum take the same ports: 16 of 21 are left.

constexpr int kBf16Tile = 12;

K2_INLINE __m512 low_bf16(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
K2_INLINE __m512 high_bf16(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000))));
}

template <int T>
void bf16_tile(const DenseStep& step) {
  __m512 sums[2][T];
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const float* sum = step.sums + t * kDenseRows + 16 * half;
      sums[half][t] = step.begins ? _mm512_setzero_ps() : _mm512_loadu_ps(sum);
    }
  }
  const uint8_t* weights = step.weights;
  Fetch fetch(step, 0, 1);
  for (int g = 0; g < step.groups; ++g) {
    const float* input = reinterpret_cast<const float*>(step.input + g * step.input_stride);
    for (int pair = 0; pair < kDenseGroup / 2; ++pair, weights += 128, input += 2) {
      fetch.with_part(pair);
      const __m512i first = _mm512_load_si512(weights);
      const __m512i second = _mm512_load_si512(weights + 64);
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const __m512 w0 = odd ? high_bf16(first) : low_bf16(first), w1 = odd ? high_bf16(second) : low_bf16(second);
#pragma GCC unroll 12
        for (int t = 0; t < T; ++t) {
          const __m512 value = _mm512_set1_ps(input[t * kDenseGroup + odd]);
          sums[0][t] = _mm512_fmadd_ps(w0, value, sums[0][t]);
          sums[1][t] = _mm512_fmadd_ps(w1, value, sums[1][t]);
        }
      }
    }
    fetch.end_group();
  }
  float* out = step.ends ? step.output : step.sums;
  const ptrdiff_t stride = step.ends ? step.output_stride : kDenseRows;
#pragma GCC unroll 12
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(out + t * stride + 16 * half, sums[half][t]);
  }
}

constexpr DenseTile kBf16Tiles[kBf16Tile] = {bf16_tile<1>, bf16_tile<2>,  bf16_tile<3>,  bf16_tile<4>,
                                             bf16_tile<5>, bf16_tile<6>,  bf16_tile<7>,  bf16_tile<8>,
                                             bf16_tile<9>, bf16_tile<10>, bf16_tile<11>, bf16_tile<12>};

K2_INLINE void clear_rows(const DenseStreams& streams) {
  for (int s = 0; s < kDenseStreams; ++s) {
    float* out = streams.output + s * streams.output_distance;
    _mm512_storeu_ps(out, _mm512_setzero_ps());
    _mm512_storeu_ps(out + 16, _mm512_setzero_ps());
  }
}

// One token: the eight sums of four row blocks at once, where those of one would wait for each other.
void bf16_streams(const DenseStreams& streams) {
  __m512 sums[kDenseStreams][2];
#pragma GCC unroll 4
  for (int s = 0; s < kDenseStreams; ++s) sums[s][0] = sums[s][1] = _mm512_setzero_ps();
  const uint8_t* weights = streams.weights;
  const float* input = reinterpret_cast<const float*>(streams.input);
  for (int pair = 0; pair < streams.groups * kDenseGroup / 2; ++pair, weights += 128, input += 2) {
    const __m512 even = _mm512_set1_ps(input[0]), odd = _mm512_set1_ps(input[1]);
#pragma GCC unroll 4
    for (int s = 0; s < kDenseStreams; ++s) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint8_t* lanes = weights + s * streams.distance + 64 * half;
        prefetch_ahead(lanes, streams.prefetch);
        const __m512i pairs = _mm512_load_si512(lanes);
        sums[s][half] = _mm512_fmadd_ps(low_bf16(pairs), even, sums[s][half]);
        sums[s][half] = _mm512_fmadd_ps(high_bf16(pairs), odd, sums[s][half]);
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kDenseStreams; ++s) {
    _mm512_storeu_ps(streams.output + s * streams.output_distance, sums[s][0]);
    _mm512_storeu_ps(streams.output + s * streams.output_distance + 16, sums[s][1]);
  }
}

constexpr DenseStreamsTile kBf16Streams = bf16_streams;

constexpr int kInt8Tile = 8;

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

// Sums over the groups stay in memory, which means the L1 cache: loads and stores take ports that multiplying leaves idle,
// and so many tokens fit the registers that enough sums are independent of each other.
template <int T>
void int8_tile(const DenseStep& step) {
  if (step.begins) {
    for (int i = 0; i < 2 * T; ++i) _mm512_store_ps(step.sums + 16 * i, _mm512_setzero_ps());
  }
  Fetch fetch(step, 0, 1);
  for (int g = 0; g < step.groups; ++g) {
    const uint8_t* block = step.weights + g * kInt8BlockBytes;
    const Int8Group* x = reinterpret_cast<const Int8Group*>(step.input + g * step.input_stride);
    __m512i dot[2][T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) dot[0][t] = dot[1][t] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int plane = 0; plane < 2; ++plane) {
      if (plane == 1) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const __m512i correction = _mm512_set1_epi32(x[t].correction);
          dot[0][t] = _mm512_add_epi32(_mm512_slli_epi32(dot[0][t], 8), correction);
          dot[1][t] = _mm512_add_epi32(_mm512_slli_epi32(dot[1][t], 8), correction);
        }
      }
#pragma GCC unroll 8
      for (int q = 0; q < 8; ++q) {
        fetch.with_part(8 * plane + q);
        const __m512i first = _mm512_load_si512(block + kInt8ScaleBytes + q * 128);
        const __m512i second = _mm512_load_si512(block + kInt8ScaleBytes + q * 128 + 64);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          const __m512i n = broadcast4(x[t].plane[plane] + 4 * q);
          dot[0][t] = _mm512_dpbusd_epi32(dot[0][t], first, n);
          dot[1][t] = _mm512_dpbusd_epi32(dot[1][t], second, n);
        }
      }
    }
    fetch.end_group();
    const __m512i pairs = _mm512_load_si512(block);
    const __m512i scales[2] = {as_i32(low_bf16(pairs)), as_i32(high_bf16(pairs))};
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        float* sum = step.sums + t * kDenseRows + 16 * half;
        const __m512i factor = _mm512_add_epi32(scales[half], _mm512_set1_epi32(x[t].exponent));
        const __m512 dots = _mm512_cvtepi32_ps(dot[half][t]);
        _mm512_store_ps(sum, _mm512_fmadd_ps(dots, _mm512_castsi512_ps(factor), _mm512_load_ps(sum)));
      }
    }
  }
  if (!step.ends) return;
  const F32x16 unit = as_f32(i32((127 - kExponentBase) << 23));  // takes back the common factor of the exponents
  for (int t = 0; t < T; ++t) {
    const float* sums = step.sums + t * kDenseRows;
    float* out = step.output + t * step.output_stride;
    for (int i = 0; i < kDenseRows; i += 16) store_f32(mul(load_f32(sums + i), unit), out + i);
  }
}

constexpr DenseTile kInt8Tiles[kInt8Tile] = {int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>,
                                             int8_tile<5>, int8_tile<6>, int8_tile<7>, int8_tile<8>};

// One token times a group of two row blocks: the weights meet both planes at once, in eight sums.
K2_INLINE void int8_group(const uint8_t* block, ptrdiff_t distance, const Int8Group& x, float* out,
                          ptrdiff_t out_distance, int prefetch) {
  __m512i dot[2][2][2];  // [plane][row block][half]
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    dot[0][r][0] = dot[0][r][1] = _mm512_setzero_si512();
    dot[1][r][0] = dot[1][r][1] = _mm512_set1_epi32(x.correction);
  }
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const __m512i high = broadcast4(x.plane[0] + 4 * q), low = broadcast4(x.plane[1] + 4 * q);
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint8_t* lanes = block + r * distance + kInt8ScaleBytes + q * 128 + 64 * half;
        prefetch_ahead(lanes, prefetch);
        const __m512i values = _mm512_load_si512(lanes);
        dot[0][r][half] = _mm512_dpbusd_epi32(dot[0][r][half], values, high);
        dot[1][r][half] = _mm512_dpbusd_epi32(dot[1][r][half], values, low);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    prefetch_ahead(block + r * distance, prefetch);
    const __m512i pairs = _mm512_load_si512(block + r * distance);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      float* sum = out + r * out_distance + 16 * half;
      const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(dot[0][r][half], 8), dot[1][r][half]);
      const __m512i scales = as_i32(half ? high_bf16(pairs) : low_bf16(pairs));
      const __m512i factor = _mm512_add_epi32(scales, _mm512_set1_epi32(x.exponent));
      _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), _mm512_castsi512_ps(factor), _mm512_loadu_ps(sum)));
    }
  }
}

void int8_streams(const DenseStreams& streams) {
  clear_rows(streams);
  const Int8Group* x = reinterpret_cast<const Int8Group*>(streams.input);
  for (int g = 0; g < streams.groups; ++g) {
    for (int s = 0; s < kDenseStreams; s += 2) {
      int8_group(streams.weights + s * streams.distance + ptrdiff_t(g) * kInt8BlockBytes, streams.distance, x[g],
                 streams.output + s * streams.output_distance, streams.output_distance, streams.prefetch);
    }
  }
  const F32x16 unit = as_f32(i32((127 - kExponentBase) << 23));
  for (int i = 0; i < 2 * kDenseStreams; ++i) {
    float* out = streams.output + i / 2 * streams.output_distance + i % 2 * 16;
    store_f32(mul(load_f32(out), unit), out);
  }
}

constexpr DenseStreamsTile kInt8Streams = int8_streams;
