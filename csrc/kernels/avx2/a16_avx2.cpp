// A16 on AVX2 and FMA: every x86 server and desktop CPU since 2013 (Intel) and 2015 (AMD).
#include <immintrin.h>

#include "kernels/kernel_file.h"

namespace k2::avx2 {
namespace {

#include "kernels/avx2/lanes-inl.h"
#include "kernels/avx2/tile-inl.h"
// on these two:
#include "kernels/a16-inl.h"

uint64_t read(const uint8_t* memory, size_t bytes) {
  // Four address streams: each runs through its quarter in order.
  const size_t quarter = bytes / 4;
  __m256i sums[4] = {};
  for (size_t i = 0; i < quarter; i += 64) {
    for (int s = 0; s < 4; ++s) {
      const uint8_t* p = memory + s * quarter + i;
      sums[s] = _mm256_xor_si256(sums[s], _mm256_xor_si256(load_values(p), load_values(p + 32)));
    }
  }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
  return uint64_t(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 1) ^ _mm256_extract_epi64(all, 2) ^
                  _mm256_extract_epi64(all, 3));
}

}  // namespace

extern const KernelTable table;
const KernelTable table = {
    .name = "avx2",
    .numerics = "A16",
    .layout_id = kLayoutL32,
    .max_tokens = kMaxTokensPerCall,
    .group_bytes = sizeof(A16Group),
    .pack_fp32 = pack_fp32,
    .pack_bf16 = pack_bf16,
    .gate_up = gate_up,
    .down = down,
    .read = read,
};

}  // namespace k2::avx2
