#include "moe/l32_digest.h"

#include <cstring>

#include "kernels/l32.h"

namespace k2 {
namespace {

// The factors of the plain sums are odd and those of the running sums even: a word that changes by d changes the plain
// sum of its lane by d and the running sum by n * d, together by d times an odd number, which is never 0 modulo 2^64.
constexpr uint64_t kPlain[2] = {0x9e3779b97f4a7c15, 0xd1b54a32d192ed03};
constexpr uint64_t kRunning[2] = {0xaef17502108ef2d8, 0xf1357aea2e62a9c4};
constexpr uint64_t kMatrix = 0x8cb92ba72f3d8dd7;
constexpr uint64_t kIndex = 0xe7037ed1a0b428db;

static_assert(kPlain[0] % 2 == 1 && kPlain[1] % 2 == 1 && kRunning[0] % 2 == 0 && kRunning[1] % 2 == 0);

// A bijection, so that digests of different blocks do not cancel in a sum but by chance.
uint64_t spread_bits(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93;
  return x ^ (x >> 32);
}

}  // namespace

uint64_t digest_of(const BlockSums& sums, L32Matrix matrix, int64_t index) {
  const uint64_t sum = sums.plain[0] * kPlain[0] + sums.plain[1] * kPlain[1] + sums.running[0] * kRunning[0] +
                       sums.running[1] * kRunning[1];
  return spread_bits(sum + uint64_t(matrix) * kMatrix + uint64_t(index) * kIndex);
}

uint64_t digest_block(const uint8_t* block, L32Matrix matrix, int64_t index) {
  typedef uint64_t Pairs __attribute__((vector_size(16)));
  Pairs plain = {0, 0}, running = {0, 0};
  for (int i = 0; i < kBlockBytes; i += sizeof(Pairs)) {
    Pairs word;
    std::memcpy(&word, block + i, sizeof(word));
    plain += word;
    running += plain;
  }
  return digest_of({{plain[0], plain[1]}, {running[0], running[1]}}, matrix, index);
}

uint64_t digest_blocks(const uint8_t* blocks, L32Matrix matrix, int64_t first_index, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += digest_block(blocks + i * kBlockBytes, matrix, first_index + i);
  return sum;
}

uint64_t digest_expert(const uint8_t* w13, const uint8_t* w2, int64_t w13_bytes, int64_t w2_bytes) {
  return digest_blocks(w13, L32Matrix::kGateUp, 0, w13_bytes / kBlockBytes) +
         digest_blocks(w2, L32Matrix::kDown, 0, w2_bytes / kBlockBytes);
}

}  // namespace k2
