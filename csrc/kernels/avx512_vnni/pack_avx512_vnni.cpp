// Layout L32 on AVX-512: a cache line of each of 16 rows is turned into 16 vectors of a tile in registers.
#include <immintrin.h>

#include "kernels/kernel_file.h"
#include "kernels/pack_table.h"

namespace k2::avx512_vnni {
namespace {

constexpr int kSelect = 0xca;  // of `vpternlog`: bits of the second operand where the first has ones, else the third

K2_INLINE void fetch(const uint32_t* words, intptr_t distance) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<intptr_t>(words) + distance), _MM_HINT_T1);
}

K2_INLINE void write(uint8_t* out, __m512i line) { _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line); }

// The sums of a block's 36 words by their place in a line: BlockSums without the last addition. A line of the block is
// 8 lanes of 64 bits; with line i of 9, `running` counts it 9 - i times.
struct LineSums {
  __m512i plain, running;
};

// The word at place j of line i counts 36 - 4i - j times in the running sum: 4 * (9 - i) - j.
K2_INLINE void add_lanes(const LineSums& lines, BlockSums* sums) {
  const __m512i plain = lines.plain;
  __m512i running = _mm512_slli_epi64(lines.running, 2);
  running = _mm512_mask_sub_epi64(running, 0xcc, running, plain);  // places 1 and 3
  running = _mm512_mask_sub_epi64(running, 0xf0, running, _mm512_add_epi64(plain, plain));  // 2 and 3
  const auto fold = [](__m512i x, uint64_t* out) {
    const __m256i half = _mm256_add_epi64(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), sum);
  };
  fold(plain, sums->plain);
  fold(running, sums->running);
}

struct RowPair {
  __m512i low, high;
};

// Interleaves the words of two rows within each group and makes each a lane of L32: byte j holds nibble j of the word
// below and nibble 4 + j above. `low` has words 0 and 1 of both rows, `high` 2 and 3.
K2_INLINE RowPair spread_rows(__m512i a, __m512i b) {
  const __m512i low_half = _mm512_set1_epi32(0xffff), low_nibbles = _mm512_set1_epi32(0x0f0f0f0f);
  // Nibbles 0..3 of a's word, then of b's; and 4..7.
  const __m512i first = _mm512_ternarylogic_epi32(low_half, a, _mm512_slli_epi32(b, 16), kSelect);
  const __m512i last = _mm512_ternarylogic_epi32(low_half, _mm512_srli_epi32(a, 16), b, kSelect);
  const __m512i even = _mm512_ternarylogic_epi32(low_nibbles, first, _mm512_slli_epi32(last, 4), kSelect);
  const __m512i odd = _mm512_ternarylogic_epi32(low_nibbles, _mm512_srli_epi32(first, 4), last, kSelect);
  return {_mm512_unpacklo_epi8(even, odd), _mm512_unpackhi_epi8(even, odd)};
}

struct Four {
  __m512i v[4];
};

// Quarter k of vector g = quarter g of argument k.
K2_INLINE Four transpose_quarters(const __m512i (&rows)[4]) {
  const __m512i low_01 = _mm512_shuffle_i32x4(rows[0], rows[1], 0x44);
  const __m512i high_01 = _mm512_shuffle_i32x4(rows[0], rows[1], 0xee);
  const __m512i low_23 = _mm512_shuffle_i32x4(rows[2], rows[3], 0x44);
  const __m512i high_23 = _mm512_shuffle_i32x4(rows[2], rows[3], 0xee);
  return {{_mm512_shuffle_i32x4(low_01, low_23, 0x88), _mm512_shuffle_i32x4(low_01, low_23, 0xdd),
           _mm512_shuffle_i32x4(high_01, high_23, 0x88), _mm512_shuffle_i32x4(high_01, high_23, 0xdd)}};
}

// The vectors of 16 rows: 4 of each group, one for each of a row's words. Adds them to the sums.
K2_INLINE void pack_half(const TileRows& rows, int half, uint8_t* blocks, LineSums (&sums)[kTileGroups]) {
  __m512i word[kWordsPerGroup][4];  // [of a row][rows / 4]: a quarter for each group, with lanes for 4 rows
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    RowPair pair[2];
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p) {
      const uint32_t* a = rows.words[half] + (4 * i + 2 * p) * rows.words_stride;
      const uint32_t* b = a + rows.words_stride;
      fetch(a, rows.fetch[half]);
      fetch(b, rows.fetch[half]);
      pair[p] = spread_rows(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
    }
    word[0][i] = _mm512_unpacklo_epi64(pair[0].low, pair[1].low);
    word[1][i] = _mm512_unpackhi_epi64(pair[0].low, pair[1].low);
    word[2][i] = _mm512_unpacklo_epi64(pair[0].high, pair[1].high);
    word[3][i] = _mm512_unpackhi_epi64(pair[0].high, pair[1].high);
  }
  // Word q is line 1 + 2q + half of 9: it counts 2 * (4 - q) - half times.
  LineSums of_half[kTileGroups];
#pragma GCC unroll 4
  for (int q = 0; q < kWordsPerGroup; ++q) {
    const Four lines = transpose_quarters(word[q]);
#pragma GCC unroll 4
    for (int g = 0; g < kTileGroups; ++g) {
      write(blocks + g * kBlockBytes + kScaleBytes + (2 * q + half) * 64, lines.v[g]);
      of_half[g].plain = q ? _mm512_add_epi64(of_half[g].plain, lines.v[g]) : lines.v[g];
      of_half[g].running = q ? _mm512_add_epi64(of_half[g].running, of_half[g].plain) : lines.v[g];
    }
  }
#pragma GCC unroll 4
  for (int g = 0; g < kTileGroups; ++g) {
    const __m512i once = of_half[g].running, twice = _mm512_add_epi64(once, once);
    sums[g].plain = _mm512_add_epi64(sums[g].plain, of_half[g].plain);
    sums[g].running = _mm512_add_epi64(sums[g].running, half ? _mm512_sub_epi64(twice, of_half[g].plain) : twice);
  }
}

// Starts the sums. Returns whether every scale is finite and small enough.
K2_INLINE bool pack_scales(const TileRows& rows, uint8_t* blocks, LineSums (&sums)[kTileGroups]) {
  __m512i pairs[4];  // quarter l of vector k: row 4l + k with its partner of the other half, a word for each group
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    __m128i of_row[4];
#pragma GCC unroll 4
    for (int l = 0; l < 4; ++l) {
      const ptrdiff_t at = (4 * l + k) * rows.scales_stride;
      of_row[l] = _mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows.scales[0] + at)),
                                     _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows.scales[1] + at)));
    }
    pairs[k] = _mm512_inserti32x4(_mm512_castsi128_si512(of_row[0]), of_row[1], 1);
    pairs[k] = _mm512_inserti32x4(_mm512_inserti32x4(pairs[k], of_row[2], 2), of_row[3], 3);
  }
  const __m512i low_01 = _mm512_unpacklo_epi32(pairs[0], pairs[1]), high_01 = _mm512_unpackhi_epi32(pairs[0], pairs[1]);
  const __m512i low_23 = _mm512_unpacklo_epi32(pairs[2], pairs[3]), high_23 = _mm512_unpackhi_epi32(pairs[2], pairs[3]);
  const __m512i line[kTileGroups] = {_mm512_unpacklo_epi64(low_01, low_23), _mm512_unpackhi_epi64(low_01, low_23),
                                     _mm512_unpacklo_epi64(high_01, high_23), _mm512_unpackhi_epi64(high_01, high_23)};
  const __m512i magnitude = _mm512_set1_epi16(kScaleMagnitude), limit = _mm512_set1_epi16(kScaleLimit);
  uint32_t too_large = 0;
#pragma GCC unroll 4
  for (int g = 0; g < kTileGroups; ++g) {
    too_large |= _mm512_cmpge_epi16_mask(_mm512_and_si512(line[g], magnitude), limit);
    write(blocks + g * kBlockBytes, line[g]);
    sums[g] = {line[g], _mm512_add_epi64(_mm512_slli_epi64(line[g], 3), line[g])};  // the first of 9 lines
  }
  return too_large == 0;
}

bool pack_tile(const TileRows& rows, uint8_t* blocks, BlockSums* sums) {
  LineSums lines[kTileGroups];
  if (!pack_scales(rows, blocks, lines)) return false;
  pack_half(rows, 0, blocks, lines);
  pack_half(rows, 1, blocks, lines);
#pragma GCC unroll 4
  for (int g = 0; g < kTileGroups; ++g) add_lanes(lines[g], &sums[g]);
  return true;
}

}  // namespace

extern const PackTable pack_table;
constinit const PackTable pack_table = {"avx512_vnni", pack_tile};

}  // namespace k2::avx512_vnni
