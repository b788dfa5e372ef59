// The peak of the multiplications of the dense kernels, in plain C++.

constexpr int kPeakChains = 4;  // of 16 lanes

uint64_t peak_bf16(int64_t rounds) {
  F32x16 sums[kPeakChains];
  for (F32x16& sum : sums) sum = f32(0.0f);
  const F32x16 values = f32(0.5f), x = f32(float(rounds));
  for (int64_t round = 0; round < rounds; ++round) {
    for (F32x16& sum : sums) sum = fma(values, x, sum);
  }
  return uint64_t(uint32_t(reduce_add(as_i32(add(add(sums[0], sums[1]), add(sums[2], sums[3]))))));
}

uint64_t peak_int8(int64_t rounds) {
  uint32_t sums[kPeakChains][16], factors[16];
  for (int i = 0; i < 16; ++i) {
    factors[i] = uint32_t(rounds) + i;
    for (int c = 0; c < kPeakChains; ++c) sums[c][i] = uint32_t(c);
  }
  for (int64_t round = 0; round < rounds; ++round) {
    for (int c = 0; c < kPeakChains; ++c) {
      for (int i = 0; i < 16; ++i) sums[c][i] = sums[c][i] * factors[i] + uint32_t(c);
    }
  }
  uint64_t all = 0;
  for (int c = 0; c < kPeakChains; ++c) {
    for (int i = 0; i < 16; ++i) all += sums[c][i];
  }
  return all;
}

constexpr DensePeak kBf16Peak = {peak_bf16, kPeakChains * 16 * 2};
constexpr DensePeak kInt8Peak = {peak_int8, kPeakChains * 16 * 2};
