#include "moe/l32_pack.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.h"
#include "kernels/l32.h"
#include "moe/l32_digest.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace k2 {
namespace {

// From a lane of L32 to the checkpoint's word: in the number of a nibble the lowest of the three bits moves up to the
// end, by two exchanges.
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

// Rows of fewer groups than a tile has, filled up with zeros.
struct FewGroups {
  uint32_t words[kRowBlock][kTileGroups * kWordsPerGroup] = {};
  uint16_t scales[kRowBlock][kTileGroups] = {};

  FewGroups(const RowBlock<PackedMatrix>& rows, GroupRange groups) {
    for (int row = 0; row < kRowBlock; ++row) {
      std::memcpy(words[row], rows.words(row) + groups.first * kWordsPerGroup, size_t(groups.count) * kGroup / 2);
      std::memcpy(scales[row], rows.scales(row) + groups.first, size_t(groups.count) * sizeof(uint16_t));
    }
  }

  TileRows tile() const {
    return {{words[0], words[kHalfBlock]}, {scales[0], scales[kHalfBlock]}, kTileGroups * kWordsPerGroup, kTileGroups};
  }
};

std::string describe_scale(uint16_t bits) {
  if ((bits & kScaleMagnitude) > 0x7f80) return "NaN";
  if ((bits & kScaleMagnitude) == 0x7f80) return bits >> 15 ? "-infinity" : "infinity";
  return text(std::bit_cast<float>(uint32_t(bits) << 16));
}

[[noreturn]] void refuse_scale(const RowBlock<PackedMatrix>& rows, int first_group) {
  const int groups = rows.half[0]->inputs / kGroup;
  for (int g = first_group; g < groups; ++g) {
    for (int row = 0; row < kRowBlock; ++row) {
      uint16_t bits;
      std::memcpy(&bits, rows.scales(row) + g, sizeof(bits));  // from any address, as it lies in a file
      if ((bits & kScaleMagnitude) < kScaleLimit) continue;
      const PackedMatrix& matrix = rows.matrix(row);
      const std::string place = matrix.file ? text(" (in ", matrix.file, ")") : "";
      throw WeightError(text(matrix.name, ": scale of row ", matrix.first_row + rows.matrix_row(row), ", group ", g,
                             ": expected a finite number below 256 in magnitude, got ", describe_scale(bits), place));
    }
  }
  throw WeightError("scales: expected the same numbers when read twice, got others");
}

// Makes what was written out visible to whoever sees what this thread writes afterwards.
void finish_writing() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// `row_index` is the index of the row block's first block in the whole matrix.
uint64_t pack_row_block(const PackTable& packer, const RowBlock<PackedMatrix>& rows, GroupRange groups, L32Matrix kind,
                        int64_t row_index, uint8_t* out) {
  const PackedMatrix& any = *rows.half[0];
  uint64_t digest = 0;
  const int last = groups.first + groups.count, count = std::min(kTileGroups, groups.count);
  for (int next = groups.first; next < last; next += kTileGroups) {
    // A tile that would reach beyond the last group begins earlier and writes some blocks again, with the same bits.
    const int first = std::min(next, last - count);
    BlockSums sums[kTileGroups];
    bool in_range;
    if (count == kTileGroups) {
      const TileRows tile{{rows.words(0) + first * kWordsPerGroup, rows.words(kHalfBlock) + first * kWordsPerGroup},
                          {rows.scales(0) + first, rows.scales(kHalfBlock) + first},
                          any.inputs / 8,
                          any.inputs / kGroup,
                          {rows.half[0]->fetch, rows.half[1]->fetch}};
      in_range = packer.tile(tile, out + int64_t(first - groups.first) * kBlockBytes, sums);
    } else {
      alignas(64) uint8_t blocks[kTileGroups * kBlockBytes];
      in_range = packer.tile(FewGroups(rows, groups).tile(), blocks, sums);
      std::memcpy(out, blocks, size_t(count) * kBlockBytes);
    }
    if (!in_range) refuse_scale(rows, first);
    for (int i = next - first; i < count; ++i) digest += digest_of(sums[i], kind, row_index + first + i);
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

uint64_t pack_l32(const PackTable& packer, const PackedMatrix& matrix, GroupRange groups, uint8_t* out) {
  const int64_t row_groups = matrix.inputs / kGroup, first_block = matrix.first_row / kRowBlock;
  uint64_t digest = 0;
  for (int block = 0; block < matrix.rows / kRowBlock; ++block) {
    digest += pack_row_block(packer, plain_rows(matrix, block), groups, L32Matrix::kDown,
                             (first_block + block) * row_groups, out + block * row_block_bytes(groups));
  }
  return digest;
}

void unpack_l32(const uint8_t* packed, GroupRange groups, const MutablePackedMatrix& matrix) {
  for (int block = 0; block < matrix.rows / kRowBlock; ++block) {
    unpack_row_block(packed + block * row_block_bytes(groups), groups, plain_rows(matrix, block));
  }
}

uint64_t pack_l32_gate_up(const PackTable& packer, const PackedMatrix& gate, const PackedMatrix& up, uint8_t* out) {
  const GroupRange groups = all_groups(gate);
  const int64_t first_block = gate.first_row / kHalfBlock;
  uint64_t digest = 0;
  for (int block = 0; block < gate.rows / kHalfBlock; ++block) {
    digest += pack_row_block(packer, gate_up_rows(gate, up, block), groups, L32Matrix::kGateUp,
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
