// The dense tiles in plain C++, one token at a time: what every instruction set must compute.

constexpr int kBf16Tile = 1;

void bf16_one(const DenseStep& step) {
  for (int half = 0; half < 2; ++half) {
    F32x16 sum = step.begins ? f32(0.0f) : load_f32(step.sums + 16 * half);
    const uint8_t* weights = step.weights + 64 * half;
    for (int g = 0; g < step.groups; ++g) {
      float x[kDenseGroup];
      __builtin_memcpy(x, step.input + g * step.input_stride, sizeof(x));
      for (int i = 0; i < kDenseGroup; i += 2, weights += 128) {
        I32x16 pair;
        __builtin_memcpy(pair.v, weights, sizeof(pair.v));
        sum = fma(as_f32(shift_left<16>(pair)), f32(x[i]), sum);
        sum = fma(as_f32(bit_and(pair, i32(int32_t(0xffff0000)))), f32(x[i + 1]), sum);
      }
    }
    store_f32(sum, (step.ends ? step.output : step.sums) + 16 * half);
  }
}

constexpr DenseTile kBf16Tiles[kBf16Tile] = {bf16_one};
constexpr DenseStreamsTile kBf16Streams = nullptr;

constexpr int kInt8Tile = 1;

struct Int8Group {
  int16_t n[32];
  int32_t exponent;
  int32_t correction;  // -128 * sum(n): takes back the +128 of the values
};

K2_INLINE void store_group(const FixedPoint& x, Int8Group* group) {
  for (int i = 0; i < 16; ++i) {
    group->n[i] = int16_t(x.n[0].v[i]);
    group->n[16 + i] = int16_t(x.n[1].v[i]);
  }
  group->exponent = x.exponent;
  group->correction = -128 * reduce_add(add(x.n[0], x.n[1]));
}

void int8_one(const DenseStep& step) {
  const F32x16 unit = as_f32(i32((127 - kExponentBase) << 23));  // takes back the common factor of the exponents
  for (int half = 0; half < 2; ++half) {
    F32x16 total = step.begins ? f32(0.0f) : load_f32(step.sums + 16 * half);
    for (int g = 0; g < step.groups; ++g) {
      const uint8_t* block = step.weights + g * kInt8BlockBytes;
      const Int8Group& x = *reinterpret_cast<const Int8Group*>(step.input + g * step.input_stride);
      I32x16 dot = i32(x.correction);
      I32x16 factor;
      for (int r = 0; r < 16; ++r) {
        for (int i = 0; i < kDenseGroup; ++i) {
          dot.v[r] += block[kInt8ScaleBytes + i / 4 * 128 + half * 64 + 4 * r + i % 4] * x.n[i];
        }
        uint16_t scale;
        __builtin_memcpy(&scale, block + 4 * r + 2 * half, sizeof(scale));
        factor.v[r] = int32_t((uint32_t(scale) << 16) + uint32_t(x.exponent));
      }
      total = fma(to_f32(dot), as_f32(factor), total);
    }
    store_f32(step.ends ? mul(total, unit) : total, (step.ends ? step.output : step.sums) + 16 * half);
  }
}

constexpr DenseTile kInt8Tiles[kInt8Tile] = {int8_one};
constexpr DenseStreamsTile kInt8Streams = nullptr;
