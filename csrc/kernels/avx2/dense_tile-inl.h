// The dense tiles on AVX2: strips of 8 rows, one FMA per strip, token and input.
//
// bf16: per input, a strip's weights are one shift or mask away from fp32, and a token's value is broadcast by its load.
// Up to two tokens take all four strips at once; more take two strips at a time, so that at six 12 sums, the weights of two
// strips, a broadcast and the mask fit the 16 registers.
//   Bound: two FMAs per cycle on Zen 3 and later = 32 operations: 104 GFLOP/s at 3.24 GHz.
// int8: `vpmaddubsw` would saturate with 8-bit weights, so weights are widened to 16 bits (a mask for even inputs, a
// shift for odd ones) and `vpmaddwd` multiplies them with the 16-bit activations as they are: one plane.
//   Bound: two vpmaddwd per cycle = 64 operations: 207 GOPS at 3.24 GHz. With the addition that each needs Zen 3 issues
//   1.53 per cycle: 160 GOPS, which the probe measures.

constexpr int kBf16Tile = 6;

K2_INLINE __m256 low_bf16(const uint8_t* p) {
  const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
K2_INLINE __m256 high_bf16(const uint8_t* p) {
  const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000))));
}

// sum += w * x, in the register of the sum: left to choose, gcc overwrites a weight or value with the sum, and spills.
K2_INLINE void add_product(__m256& sum, __m256 w, __m256 x) {
  __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
}

// Calls add(s, t, weight(s), value(t)) for all pairs; the fewer of both stay in registers meanwhile.
template <int S, int T, class Weight, class Value, class Add>
K2_INLINE void cross(Weight weight, Value value, Add add) {
  if constexpr (S > T) {
    decltype(value(0)) values[T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) values[t] = value(t);
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const auto w = weight(s);
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) add(s, t, w, values[t]);
    }
  } else {
    decltype(weight(0)) w[S];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) w[s] = weight(s);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const auto x = value(t);
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) add(s, t, w[s], x);
    }
  }
}

// Strips first..first+S-1 of the row block.
template <int S, int T>
K2_INLINE void bf16_strips(const DenseStep& step, int first) {
  __m256 sums[S][T];
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const float* sum = step.sums + t * kDenseRows + 8 * (first + s);
      sums[s][t] = step.begins ? _mm256_setzero_ps() : _mm256_loadu_ps(sum);
    }
  }
  const uint8_t* weights = step.weights + 32 * first;
  Fetch fetch(step, first / S, 4 / S);
  for (int g = 0; g < step.groups; ++g) {
    fetch.with_group();
    const float* input = reinterpret_cast<const float*>(step.input + g * step.input_stride);
    for (int pair = 0; pair < kDenseGroup / 2; ++pair, weights += 128, input += 2) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const auto weight = [&](int s) { return odd ? high_bf16(weights + 32 * s) : low_bf16(weights + 32 * s); };
        const auto value = [&](int t) { return _mm256_broadcast_ss(input + t * kDenseGroup + odd); };
        cross<S, T>(weight, value, [&](int s, int t, __m256 w, __m256 x) { add_product(sums[s][t], w, x); });
      }
    }
  }
  float* out = (step.ends ? step.output : step.sums) + 8 * first;
  const ptrdiff_t stride = step.ends ? step.output_stride : kDenseRows;
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) _mm256_storeu_ps(out + t * stride + 8 * s, sums[s][t]);
  }
}

template <int T>
void bf16_tile(const DenseStep& step) {
  if constexpr (T <= 2) {
    bf16_strips<4, T>(step, 0);
  } else {
    bf16_strips<2, T>(step, 0);
    bf16_strips<2, T>(step, 2);
  }
}

constexpr DenseTile kBf16Tiles[kBf16Tile] = {bf16_tile<1>, bf16_tile<2>, bf16_tile<3>,
                                             bf16_tile<4>, bf16_tile<5>, bf16_tile<6>};

// One token times a group of R row blocks: 4 R sums at once, where those of one block would wait for each other.
template <int R>
K2_INLINE void bf16_group(const uint8_t* weights, ptrdiff_t distance, const float* input, float* out,
                          ptrdiff_t out_distance, int prefetch) {
  __m256 sums[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sums[r][s] = _mm256_loadu_ps(out + r * out_distance + 8 * s);
  }
  for (int pair = 0; pair < kDenseGroup / 2; ++pair, weights += 128, input += 2) {
    const __m256 even = _mm256_broadcast_ss(input), odd = _mm256_broadcast_ss(input + 1);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint8_t* lanes = weights + r * distance;
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        if (s % 2 == 0) prefetch_ahead(lanes + 32 * s, prefetch);
        add_product(sums[r][s], low_bf16(lanes + 32 * s), even);
        add_product(sums[r][s], high_bf16(lanes + 32 * s), odd);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) _mm256_storeu_ps(out + r * out_distance + 8 * s, sums[r][s]);
  }
}

K2_INLINE void clear_rows(const DenseStreams& streams) {
  for (int s = 0; s < kDenseStreams; ++s) {
    float* out = streams.output + s * streams.output_distance;
    for (int i = 0; i < kDenseRows; i += 8) _mm256_storeu_ps(out + i, _mm256_setzero_ps());
  }
}

void bf16_streams(const DenseStreams& streams) {
  clear_rows(streams);
  const float* input = reinterpret_cast<const float*>(streams.input);
  for (int g = 0; g < streams.groups; ++g, input += kDenseGroup) {
    for (int s = 0; s < kDenseStreams; s += 2) {
      bf16_group<2>(streams.weights + s * streams.distance + ptrdiff_t(g) * kBf16BlockBytes, streams.distance, input,
                    streams.output + s * streams.output_distance, streams.output_distance, streams.prefetch);
    }
  }
}

constexpr DenseStreamsTile kBf16Streams = bf16_streams;

constexpr int kInt8Tile = 4;

struct Int8Group {
  int16_t n[32];  // of every four inputs, the even ones, then the odd ones
  int32_t exponent;
  int32_t correction;  // -128 * sum(n): takes back the +128 of the values
};

// 16 values as int16; of every four, the even ones first.
K2_INLINE void store_pairs(I32x16 n, int16_t* out) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(n.a, n.b), 0xd8);  // packs works per 128-bit half
  const __m256i pairs = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xd8), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), pairs);
}

K2_INLINE void store_group(const FixedPoint& x, Int8Group* group) {
  store_pairs(x.n[0], group->n);
  store_pairs(x.n[1], group->n + 16);
  group->exponent = x.exponent;
  group->correction = -128 * reduce_add(add(x.n[0], x.n[1]));
}

// Of every four inputs, the even and the odd ones, in 16 bits.
struct Pairs {
  __m256i even, odd;
};

// The bf16 scales of one strip, as the bits of fp32.
K2_INLINE __m256i strip_scales(const uint8_t* block, int strip) {
  const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(block + strip % 2 * 32));
  return strip < 2 ? _mm256_slli_epi32(pairs, 16) : _mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000)));
}

// Strips first..first+S-1 of the row block.
template <int S, int T>
K2_INLINE void int8_strips(const DenseStep& step, int first) {
  __m256 totals[S][T];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const float* total = step.sums + t * kDenseRows + 8 * (first + s);
      totals[s][t] = step.begins ? _mm256_setzero_ps() : _mm256_loadu_ps(total);
    }
  }
  Fetch fetch(step, first / S, 4 / S);
  for (int g = 0; g < step.groups; ++g) {
    const uint8_t* block = step.weights + g * kInt8BlockBytes;
    const Int8Group* x = reinterpret_cast<const Int8Group*>(step.input + g * step.input_stride);
    fetch.with_group();
    __m256i dot[S][T];
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) dot[s][t] = _mm256_setzero_si256();
    }
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      const auto weight = [&](int s) {
        const uint8_t* p = block + kInt8ScaleBytes + q * 128 + (first + s) * 32;
        const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
        return Pairs{_mm256_and_si256(values, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(values, 8)};
      };
      const auto value = [&](int t) {
        const int16_t* n = x[t].n + 4 * q;
        return Pairs{broadcast_pair(n), broadcast_pair(n + 2)};
      };
      cross<S, T>(weight, value, [&](int s, int t, const Pairs& w, const Pairs& n) {
        dot[s][t] = _mm256_add_epi32(dot[s][t], _mm256_madd_epi16(w.even, n.even));
        dot[s][t] = _mm256_add_epi32(dot[s][t], _mm256_madd_epi16(w.odd, n.odd));
        pin(dot[s][t]);
      });
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const __m256i scales = strip_scales(block, first + s);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(dot[s][t], _mm256_set1_epi32(x[t].correction)));
        const __m256i factor = _mm256_add_epi32(scales, _mm256_set1_epi32(x[t].exponent));
        totals[s][t] = _mm256_fmadd_ps(sum, _mm256_castsi256_ps(factor), totals[s][t]);
      }
    }
  }
  const __m256 unit = step.ends ? _mm256_castsi256_ps(_mm256_set1_epi32((127 - kExponentBase) << 23))
                                : _mm256_set1_ps(1.0f);
  float* out = (step.ends ? step.output : step.sums) + 8 * first;
  const ptrdiff_t stride = step.ends ? step.output_stride : kDenseRows;
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) _mm256_storeu_ps(out + t * stride + 8 * s, _mm256_mul_ps(totals[s][t], unit));
  }
}

template <int T>
void int8_tile(const DenseStep& step) {
  if constexpr (T <= 2) {
    int8_strips<4, T>(step, 0);
  } else {
    int8_strips<2, T>(step, 0);
    int8_strips<2, T>(step, 2);
  }
}

constexpr DenseTile kInt8Tiles[kInt8Tile] = {int8_tile<1>, int8_tile<2>, int8_tile<3>, int8_tile<4>};

// One token times a group of R row blocks.
template <int R>
K2_INLINE void int8_group(const uint8_t* block, ptrdiff_t distance, const Int8Group& x, float* out,
                          ptrdiff_t out_distance, int prefetch) {
  __m256i dot[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) dot[r][s] = _mm256_set1_epi32(x.correction);
  }
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    const __m256i even = broadcast_pair(x.n + 4 * q), odd = broadcast_pair(x.n + 4 * q + 2);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        const uint8_t* lanes = block + r * distance + kInt8ScaleBytes + q * 128 + s * 32;
        if (s % 2 == 0) prefetch_ahead(lanes, prefetch);
        const __m256i values = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
        const __m256i low = _mm256_and_si256(values, _mm256_set1_epi16(0xff)), high = _mm256_srli_epi16(values, 8);
        dot[r][s] = _mm256_add_epi32(dot[r][s], _mm256_madd_epi16(low, even));
        dot[r][s] = _mm256_add_epi32(dot[r][s], _mm256_madd_epi16(high, odd));
        pin(dot[r][s]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    prefetch_ahead(block + r * distance, prefetch);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      float* sum = out + r * out_distance + 8 * s;
      const __m256i factor = _mm256_add_epi32(strip_scales(block + r * distance, s), _mm256_set1_epi32(x.exponent));
      _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[r][s]), _mm256_castsi256_ps(factor),
                                            _mm256_loadu_ps(sum)));
    }
  }
}

void int8_streams(const DenseStreams& streams) {
  clear_rows(streams);
  const Int8Group* x = reinterpret_cast<const Int8Group*>(streams.input);
  for (int g = 0; g < streams.groups; ++g) {
    for (int s = 0; s < kDenseStreams; s += 2) {
      int8_group<2>(streams.weights + s * streams.distance + ptrdiff_t(g) * kInt8BlockBytes, streams.distance, x[g],
                    streams.output + s * streams.output_distance, streams.output_distance, streams.prefetch);
    }
  }
  const __m256 unit = _mm256_castsi256_ps(_mm256_set1_epi32((127 - kExponentBase) << 23));
  for (int s = 0; s < kDenseStreams; ++s) {
    float* out = streams.output + s * streams.output_distance;
    for (int i = 0; i < kDenseRows; i += 8) _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(out + i), unit));
  }
}

constexpr DenseStreamsTile kInt8Streams = int8_streams;
