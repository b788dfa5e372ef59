#include "moe/l32_pack.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.h"
#include "core/shuffle.h"
#include "kernels/a16.h"
#include "kernels/l32.h"
#include "moe/l32_digest.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace k2 {
namespace {

// 128-bit vectors as GCC and Clang know them on every CPU: the packer waits for memory, wider ones gain nothing.
typedef uint32_t Words __attribute__((vector_size(16)));
typedef int16_t Halves __attribute__((vector_size(16)));

constexpr int kWordsPerGroup = 4;
constexpr int kTileGroups = 4;  // packed together: their words of one row are one cache line
constexpr int kTileBytes = kTileGroups * kBlockBytes;
// How far ahead of the tile its rows are fetched: no prefetcher of a CPU follows 32 streams.
constexpr int kPrefetchWords = 4 * kTileGroups * kWordsPerGroup;
constexpr int16_t kMagnitude = 0x7fff;
constexpr int16_t kScaleLimit = kScaleExponentLimit << 7;  // the smallest magnitude, in bf16 bits, that is too large

// From any address: what is read from a file need not be aligned.
template <class Value>
Value load(const void* from) {
  Value v;
  std::memcpy(&v, from, sizeof(v));
  return v;
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
  typedef uint64_t Pairs __attribute__((vector_size(16)));
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

// The inverse, of one lane: in the number of a nibble the lowest of the three bits moves up to the end, by two
// exchanges.
constexpr uint32_t gather(uint32_t lane) {
  uint32_t move = (lane ^ (lane >> 4)) & 0x00f000f0;  // the middle nibbles of each half
  lane ^= move ^ (move << 4);
  move = (lane ^ (lane >> 8)) & 0x0000ff00;  // bytes 1 and 2
  return lane ^ move ^ (move << 8);
}

static_assert(gather(0x73625140) == 0x76543210);

// The matrix rows that make up one row block: 16 for each half.
template <class Matrix>
struct RowBlock {
  const Matrix* half[2];
  int first_row[2];

  const Matrix& matrix(int row) const { return *half[row / kHalfBlock]; }
  int matrix_row(int row) const { return first_row[row / kHalfBlock] + row % kHalfBlock; }
  auto* words(int row) const { return matrix(row).words + int64_t(matrix_row(row)) * (matrix(row).inputs / 8); }
  auto* scales(int row) const { return matrix(row).scales + int64_t(matrix_row(row)) * (matrix(row).inputs / kGroup); }
};

// 32 rows of the groups of one tile, wherever they lie.
struct TileRows {
  const uint32_t* words[kRowBlock];
  const uint16_t* scales[kRowBlock];
};

void pack_values(const TileRows& rows, uint8_t* tile) {
  for (int row = 0; row < kRowBlock; row += 4) {
    uint8_t* lanes = tile + kScaleBytes + row * sizeof(uint32_t);
    for (int r = 0; r < 4; ++r) __builtin_prefetch(rows.words[row + r] + kPrefetchWords);
    for (int g = 0; g < kTileGroups; ++g, lanes += kBlockBytes) {
      const int at = g * kWordsPerGroup;
      const RowPair first = spread_rows(load<Words>(rows.words[row] + at), load<Words>(rows.words[row + 1] + at));
      const RowPair second = spread_rows(load<Words>(rows.words[row + 2] + at), load<Words>(rows.words[row + 3] + at));
      const Columns word = columns(first, second);
#pragma GCC unroll 4  // else the columns go through memory
      for (int q = 0; q < kWordsPerGroup; ++q) {
        std::memcpy(lanes + q * kRowBlock * sizeof(uint32_t), &word.v[q], sizeof(Words));
      }
    }
  }
}

// The scales of row i and row 16 + i, of the tile's groups, as one word per group.
Words paired_scales(const TileRows& rows, int i) {
  uint64_t low = 0, high = 0;
  std::memcpy(&low, rows.scales[i], sizeof(low));
  std::memcpy(&high, rows.scales[i + kHalfBlock], sizeof(high));
  typedef uint64_t Pairs __attribute__((vector_size(16)));
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
      too_large |= (Halves(pairs[r]) & kMagnitude) >= kScaleLimit;
    }
    const Columns of_group = columns(interleave(pairs[0], pairs[1]), interleave(pairs[2], pairs[3]));
#pragma GCC unroll 4
    for (int g = 0; g < kTileGroups; ++g) {
      std::memcpy(tile + g * kBlockBytes + i * sizeof(uint32_t), &of_group.v[g], sizeof(Words));
    }
  }
  const Words any = Words(too_large);
  return (any[0] | any[1] | any[2] | any[3]) == 0;
}

// Rows of the last groups, where they are fewer than a tile's, filled up with zeros.
struct Remainder {
  uint32_t words[kRowBlock][kTileGroups * kWordsPerGroup] = {};
  uint16_t scales[kRowBlock][kTileGroups] = {};

  Remainder(const RowBlock<PackedMatrix>& rows, int first_group, int groups) {
    for (int row = 0; row < kRowBlock; ++row) {
      std::memcpy(words[row], rows.words(row) + first_group * kWordsPerGroup, size_t(groups) * kGroup / 2);
      std::memcpy(scales[row], rows.scales(row) + first_group, size_t(groups) * sizeof(uint16_t));
    }
  }

  TileRows rows() const {
    TileRows out;
    for (int row = 0; row < kRowBlock; ++row) {
      out.words[row] = words[row];
      out.scales[row] = scales[row];
    }
    return out;
  }
};

std::string describe_scale(uint16_t bits) {
  if ((bits & kMagnitude) > 0x7f80) return "NaN";
  if ((bits & kMagnitude) == 0x7f80) return bits >> 15 ? "-infinity" : "infinity";
  return text(std::bit_cast<float>(uint32_t(bits) << 16));
}

[[noreturn]] void refuse_scale(const RowBlock<PackedMatrix>& rows, int first_group) {
  const int groups = rows.half[0]->inputs / kGroup;
  for (int g = first_group; g < groups; ++g) {
    for (int row = 0; row < kRowBlock; ++row) {
      const uint16_t bits = load<uint16_t>(rows.scales(row) + g);
      if ((bits & kMagnitude) < kScaleLimit) continue;
      const PackedMatrix& matrix = rows.matrix(row);
      const std::string place = matrix.file ? text(" (in ", matrix.file, ")") : "";
      throw WeightError(text(matrix.name, ": scale of row ", matrix.first_row + rows.matrix_row(row), ", group ", g,
                             ": expected a finite number below 256 in magnitude, got ", describe_scale(bits), place));
    }
  }
  throw WeightError("scales: expected the same numbers when read twice, got others");
}

// Writes 16 bytes past the caches: nothing reads the weights soon, and lines that are written whole need not be read
// first.
void write_past_caches(DigestWord word, uint8_t* out) {
#if defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(out), reinterpret_cast<__m128i>(word));
#else
  std::memcpy(out, &word, sizeof(word));
#endif
}

// Copies blocks from a tile into their place and returns their digest.
uint64_t write_blocks(const uint8_t* tile, int count, L32Matrix kind, int64_t first_index, uint8_t* out) {
  uint64_t digest = 0;
  for (int block = 0; block < count; ++block) {
    BlockDigest sums;
    for (int i = 0; i < kBlockBytes; i += sizeof(DigestWord)) {
      const auto word = load<DigestWord>(tile + block * kBlockBytes + i);
      sums.add(word);
      write_past_caches(word, out + block * kBlockBytes + i);
    }
    digest += sums.finish(kind, first_index + block);
  }
  return digest;
}

// Makes what was written out visible to whoever sees what this thread writes afterwards.
void finish_writing() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// `row_index` is the index of the row block's first block in the whole matrix.
uint64_t pack_row_block(const RowBlock<PackedMatrix>& rows, GroupRange groups, L32Matrix kind, int64_t row_index,
                        uint8_t* out) {
  TileRows tile_rows;
  for (int row = 0; row < kRowBlock; ++row) {
    tile_rows.words[row] = rows.words(row) + groups.first * kWordsPerGroup;
    tile_rows.scales[row] = rows.scales(row) + groups.first;
  }
  uint64_t digest = 0;
  const int last = groups.first + groups.count;
  for (int first = groups.first; first < last; first += kTileGroups) {
    alignas(64) uint8_t tile[kTileBytes];
    const int count = std::min(kTileGroups, last - first);
    bool in_range;
    if (count == kTileGroups) {
      in_range = pack_scales(tile_rows, tile);
      pack_values(tile_rows, tile);
    } else {
      const Remainder remainder(rows, first, count);
      in_range = pack_scales(remainder.rows(), tile);
      pack_values(remainder.rows(), tile);
    }
    if (!in_range) refuse_scale(rows, first);
    digest += write_blocks(tile, count, kind, row_index + first, out + int64_t(first - groups.first) * kBlockBytes);
    for (int row = 0; row < kRowBlock; ++row) {
      tile_rows.words[row] += kTileGroups * kWordsPerGroup;
      tile_rows.scales[row] += kTileGroups;
    }
  }
  finish_writing();
  return digest;
}

void unpack_row_block(const uint8_t* packed, GroupRange groups, const RowBlock<MutablePackedMatrix>& rows) {
  for (int g = groups.first; g < groups.first + groups.count; ++g, packed += kBlockBytes) {
    uint16_t scales[kRowBlock];
    uint32_t lanes[kWordsPerGroup][kRowBlock];
    std::memcpy(scales, packed, sizeof(scales));
    std::memcpy(lanes, packed + kScaleBytes, sizeof(lanes));
    for (int row = 0; row < kRowBlock; ++row) {
      rows.scales(row)[g] = scales[2 * (row % kHalfBlock) + row / kHalfBlock];
      uint32_t* words = rows.words(row) + g * kWordsPerGroup;
      for (int q = 0; q < kWordsPerGroup; ++q) words[q] = gather(lanes[q][row]);
    }
  }
}

template <class Matrix>
RowBlock<Matrix> plain_rows(const Matrix& matrix, int block) {
  return {{&matrix, &matrix}, {block * kRowBlock, block * kRowBlock + kHalfBlock}};
}

template <class Matrix>
RowBlock<Matrix> gate_up_rows(const Matrix& gate, const Matrix& up, int block) {
  return {{&gate, &up}, {block * kHalfBlock, block * kHalfBlock}};
}

int64_t row_block_bytes(GroupRange groups) { return int64_t(groups.count) * kBlockBytes; }

template <class Matrix>
GroupRange all_groups(const Matrix& matrix) {
  return {0, matrix.inputs / kGroup};
}

}  // namespace

uint64_t pack_l32(const PackedMatrix& matrix, GroupRange groups, uint8_t* out) {
  const int64_t row_groups = matrix.inputs / kGroup, first_block = matrix.first_row / kRowBlock;
  uint64_t digest = 0;
  for (int block = 0; block < matrix.rows / kRowBlock; ++block) {
    digest += pack_row_block(plain_rows(matrix, block), groups, L32Matrix::kDown, (first_block + block) * row_groups,
                             out + block * row_block_bytes(groups));
  }
  return digest;
}

void unpack_l32(const uint8_t* packed, GroupRange groups, const MutablePackedMatrix& matrix) {
  for (int block = 0; block < matrix.rows / kRowBlock; ++block) {
    unpack_row_block(packed + block * row_block_bytes(groups), groups, plain_rows(matrix, block));
  }
}

uint64_t pack_l32_gate_up(const PackedMatrix& gate, const PackedMatrix& up, uint8_t* out) {
  const GroupRange groups = all_groups(gate);
  const int64_t first_block = gate.first_row / kHalfBlock;
  uint64_t digest = 0;
  for (int block = 0; block < gate.rows / kHalfBlock; ++block) {
    digest += pack_row_block(gate_up_rows(gate, up, block), groups, L32Matrix::kGateUp,
                             (first_block + block) * groups.count, out + block * row_block_bytes(groups));
  }
  return digest;
}

void unpack_l32_gate_up(const uint8_t* packed, const MutablePackedMatrix& gate, const MutablePackedMatrix& up) {
  const GroupRange groups = all_groups(gate);
  for (int block = 0; block < gate.rows / kHalfBlock; ++block) {
    unpack_row_block(packed + block * row_block_bytes(groups), groups, gate_up_rows(gate, up, block));
  }
}

}  // namespace k2
