// One block of weights times A8 activations in plain C++.

// sum over the group of q * n for 16 rows; `values` is the group's first vector of the wanted half.
K2_INLINE I32x16 dot_group(const uint8_t* values, const A8Group& x) {
  I32x16 sum = i32(x.correction);
  for (int q = 0; q < 4; ++q) {
    uint32_t lanes[16];
    __builtin_memcpy(lanes, values + q * 128, sizeof(lanes));
    for (int j = 0; j < 4; ++j) {
      const int32_t n_low = x.values[8 * q + j];
      const int32_t n_high = x.values[8 * q + j + 4];
      for (int r = 0; r < 16; ++r) {
        const uint32_t byte = lanes[r] >> (8 * j);
        sum.v[r] += int32_t(byte & 15) * n_low + int32_t((byte >> 4) & 15) * n_high;
      }
    }
  }
  return sum;
}

// Scales of one half times the factor of the activations.
K2_INLINE F32x16 scale_group(const uint8_t* block, int half, const A8Group& x) {
  I32x16 scale;
  for (int r = 0; r < 16; ++r) {
    uint16_t bits;
    __builtin_memcpy(&bits, block + 4 * r + 2 * half, sizeof(bits));
    scale.v[r] = int32_t(uint32_t(bits) << 16);
  }
  return mul(as_f32(scale), f32(x.factor));
}
