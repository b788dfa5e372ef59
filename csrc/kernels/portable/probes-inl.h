// Raw speed in plain C++: what reading and what multiplying cost with nothing else around them.

uint64_t read(const uint8_t* memory, size_t bytes) {
  uint64_t sums[4] = {};
  for (size_t i = 0; i < bytes; i += 32) {
    uint64_t words[4];
    __builtin_memcpy(words, memory + i, sizeof(words));
    for (int w = 0; w < 4; ++w) sums[w] ^= words[w];
  }
  return sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
}

constexpr int kPeakChains = 4;  // of 16 lanes
constexpr int64_t kPeakOperations = kPeakChains * 16 * 2;

// 32-bit multiplications and additions, as many independent ones as hide their latency.
uint64_t peak(int64_t rounds) {
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
