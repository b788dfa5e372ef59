// The dense tiles on AVX2: strips of 8 rows, one FMA per strip, token and input.
//
// bf16: per input, a strip's weights are one shift or mask away from fp32, and a token's value is broadcast by its load.
// Up to three tokens take all four strips at once (12 sums); four to six take two strips at a time, so that 12 sums, a
// strip's weights and a broadcast fit the 16 registers.
//   Bound: two FMAs per cycle on Zen 3 and later = 32 operations: 104 GFLOP/s at 3.24 GHz.
// int8: `vpmaddubsw` would saturate with 8-bit weights, so weights are widened to 16 bits (a mask for even inputs, a
// shift for odd ones) and `vpmaddwd` multiplies them with the 16-bit activations as they are: one plane.
//   Bound: two vpmaddwd per cycle = 64 operations: 207 GOPS at 3.24 GHz; the additions run on other ports.

constexpr int kBf16Tile = 6;

K2_INLINE __m256 low_bf16(const uint8_t* p) {
  const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
}
K2_INLINE __m256 high_bf16(const uint8_t* p) {
  const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int32_t(0xffff0000))));
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
      const float* out = step.output + t * step.output_stride + 8 * (first + s);
      sums[s][t] = step.begins ? _mm256_setzero_ps() : _mm256_loadu_ps(out);
    }
  }
  const uint8_t* weights = step.weights + 32 * first;
  const uint8_t* input = step.input;
  for (int pair = 0; pair < step.groups * kDenseGroup / 2; ++pair, weights += 128, input += 2 * sizeof(float)) {
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const auto weight = [&](int s) { return odd ? high_bf16(weights + 32 * s) : low_bf16(weights + 32 * s); };
      const auto value = [&](int t) {
        return _mm256_broadcast_ss(reinterpret_cast<const float*>(input + t * step.input_stride) + odd);
      };
      cross<S, T>(weight, value, [&](int s, int t, __m256 w, __m256 x) {
        sums[s][t] = _mm256_fmadd_ps(w, x, sums[s][t]);
        pin(sums[s][t]);
      });
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      _mm256_storeu_ps(step.output + t * step.output_stride + 8 * (first + s), sums[s][t]);
    }
  }
}

template <int T>
void bf16_tile(const DenseStep& step) {
  if constexpr (T <= 3) {
    bf16_strips<4, T>(step, 0);
  } else {
    bf16_strips<2, T>(step, 0);
    bf16_strips<2, T>(step, 2);
  }
}

constexpr DenseTile kBf16Tiles[kBf16Tile] = {bf16_tile<1>, bf16_tile<2>, bf16_tile<3>,
                                             bf16_tile<4>, bf16_tile<5>, bf16_tile<6>};

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

K2_INLINE __m256i broadcast_pair(const int16_t* n) {
  int32_t pair;
  __builtin_memcpy(&pair, n, sizeof(pair));
  return _mm256_set1_epi32(pair);
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
  const Int8Group* x[T];
  __m256 totals[S][T];
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    x[t] = reinterpret_cast<const Int8Group*>(step.input + t * step.input_stride);
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      const float* out = step.output + t * step.output_stride + 8 * (first + s);
      totals[s][t] = step.begins ? _mm256_setzero_ps() : _mm256_loadu_ps(out);
    }
  }
  for (int g = 0; g < step.groups; ++g) {
    const uint8_t* block = step.weights + g * kInt8BlockBytes;
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
        const int16_t* n = x[t][g].n + 4 * q;
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
        const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(dot[s][t], _mm256_set1_epi32(x[t][g].correction)));
        const __m256i factor = _mm256_add_epi32(scales, _mm256_set1_epi32(x[t][g].exponent));
        totals[s][t] = _mm256_fmadd_ps(sum, _mm256_castsi256_ps(factor), totals[s][t]);
      }
    }
  }
  const __m256 unit = step.ends ? _mm256_castsi256_ps(_mm256_set1_epi32((127 - kExponentBase) << 23))
                                : _mm256_set1_ps(1.0f);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
      _mm256_storeu_ps(step.output + t * step.output_stride + 8 * (first + s), _mm256_mul_ps(totals[s][t], unit));
    }
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
