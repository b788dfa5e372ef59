// Layout L32 with 128-bit vectors as GCC and Clang know them on every CPU.
#include <string.h>

#include "core/shuffle.h"
#include "kernels/kernel_file.h"
#include "kernels/pack_table.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace k2::portable {
namespace {

typedef uint32_t Words __attribute__((vector_size(16)));
typedef int16_t Halves __attribute__((vector_size(16)));
typedef uint64_t Pairs __attribute__((vector_size(16)));

constexpr int kTileBytes = kTileGroups * kBlockBytes;

// From any address: what is read from a file need not be aligned.
template <class Value>
Value load(const void* from) {
  Value v;
  memcpy(&v, from, sizeof(v));
  return v;
}

const void* at_distance(const uint32_t* words, intptr_t bytes) {
  return reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(words) + bytes);
}

// Lanes (0 of row 0, 0 of row 1, 1 of row 0, 1 of row 1) and (2, 2, 3, 3).
struct RowPair {
  Words low, high;
};

RowPair interleave(Words a, Words b) {
  return {K2_SHUFFLE(a, b, 0, 4, 1, 5), K2_SHUFFLE(a, b, 2, 6, 3, 7)};
}

// Lane r of column i = lane i of row r.
struct Columns {
  Words v[4];
};

Columns columns(const RowPair& a, const RowPair& b) {
  const Pairs a_low = Pairs(a.low), a_high = Pairs(a.high), b_low = Pairs(b.low), b_high = Pairs(b.high);
  return {{Words(K2_SHUFFLE(a_low, b_low, 0, 2)), Words(K2_SHUFFLE(a_low, b_low, 1, 3)),
           Words(K2_SHUFFLE(a_high, b_high, 0, 2)), Words(K2_SHUFFLE(a_high, b_high, 1, 3))}};
}

// Interleaves the words of two rows and makes each a lane of L32: byte j holds nibble j of the word below and nibble
// 4 + j above.
RowPair spread_rows(Words a, Words b) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  const Words first = (a & 0xffff) | (b << 16);  // nibbles 0..3 of a's word, then of b's
  const Words last = (a >> 16) | (b & 0xffff0000);
  const Bytes even = Bytes((first & 0x0f0f0f0f) | ((last & 0x0f0f0f0f) << 4));
  const Bytes odd = Bytes(((first >> 4) & 0x0f0f0f0f) | (last & 0xf0f0f0f0));
  return {Words(K2_SHUFFLE(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)),
          Words(K2_SHUFFLE(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31))};
}

void pack_values(const TileRows& rows, uint8_t* tile) {
  for (int row = 0; row < kRowBlock; row += 4) {
    uint8_t* lanes = tile + kScaleBytes + row * sizeof(uint32_t);
    const uint32_t* from[4];
    for (int r = 0; r < 4; ++r) {
      from[r] = rows.words[row / kHalfBlock] + (row % kHalfBlock + r) * rows.words_stride;
      __builtin_prefetch(at_distance(from[r], kFetchAhead));
      __builtin_prefetch(at_distance(from[r], rows.fetch[row / kHalfBlock]), 0, 2);
    }
    for (int g = 0; g < kTileGroups; ++g, lanes += kBlockBytes) {
      const int at = g * kWordsPerGroup;
      const RowPair first = spread_rows(load<Words>(from[0] + at), load<Words>(from[1] + at));
      const RowPair second = spread_rows(load<Words>(from[2] + at), load<Words>(from[3] + at));
      const Columns word = columns(first, second);
#pragma GCC unroll 4  // else the columns go through memory
      for (int q = 0; q < kWordsPerGroup; ++q) {
        memcpy(lanes + q * kRowBlock * sizeof(uint32_t), &word.v[q], sizeof(Words));
      }
    }
  }
}

// The scales of row i and row 16 + i, of the tile's groups, as one word per group.
Words paired_scales(const TileRows& rows, int i) {
  const auto low = load<uint64_t>(rows.scales[0] + i * rows.scales_stride);
  const auto high = load<uint64_t>(rows.scales[1] + i * rows.scales_stride);
  return Words(K2_SHUFFLE(Halves(Pairs{low, 0}), Halves(Pairs{high, 0}), 0, 8, 1, 9, 2, 10, 3, 11));
}

// Returns whether every scale is finite and small enough.
bool pack_scales(const TileRows& rows, uint8_t* tile) {
  Halves too_large = {};
  for (int i = 0; i < kHalfBlock; i += 4) {
    Words pairs[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      pairs[r] = paired_scales(rows, i + r);
      too_large |= (Halves(pairs[r]) & kScaleMagnitude) >= kScaleLimit;
    }
    const Columns of_group = columns(interleave(pairs[0], pairs[1]), interleave(pairs[2], pairs[3]));
#pragma GCC unroll 4
    for (int g = 0; g < kTileGroups; ++g) {
      memcpy(tile + g * kBlockBytes + i * sizeof(uint32_t), &of_group.v[g], sizeof(Words));
    }
  }
  const Words any = Words(too_large);
  return (any[0] | any[1] | any[2] | any[3]) == 0;
}

// Past the caches: lines that are written whole need not be read first.
void write(Pairs word, uint8_t* out) {
#if defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(out), reinterpret_cast<__m128i>(word));
#else
  memcpy(out, &word, sizeof(word));
#endif
}

// Copies a tile into its place.
void write_blocks(const uint8_t* tile, uint8_t* out, BlockSums* sums) {
  for (int block = 0; block < kTileGroups; ++block) {
    Pairs plain = {}, running = {};
    for (int i = 0; i < kBlockBytes; i += sizeof(Pairs)) {
      const auto word = load<Pairs>(tile + block * kBlockBytes + i);
      plain += word;
      running += plain;
      write(word, out + block * kBlockBytes + i);
    }
    memcpy(sums[block].plain, &plain, sizeof(plain));
    memcpy(sums[block].running, &running, sizeof(running));
  }
}

bool pack_tile(const TileRows& rows, uint8_t* blocks, BlockSums* sums) {
  alignas(64) uint8_t tile[kTileBytes];  // in the L1 cache: a line that is written in pieces would be read first
  if (!pack_scales(rows, tile)) return false;
  pack_values(rows, tile);
  write_blocks(tile, blocks, sums);
  return true;
}

}  // namespace

extern const PackTable pack_table;
constinit const PackTable pack_table = {"portable", pack_tile};

}  // namespace k2::portable
