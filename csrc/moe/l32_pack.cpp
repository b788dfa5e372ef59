#include "moe/l32_pack.h"

#include <cstring>

#include "core/error.h"
#include "kernels/a16.h"
#include "kernels/l32.h"

namespace k2 {
namespace {

constexpr int kWordsPerGroup = 4;

// Nibbles 0..3 of a word go to the low nibbles of bytes 0..3, nibbles 4..7 to the high ones.
constexpr uint32_t spread(uint32_t word) {
  uint32_t low = word & 0xffff;
  uint32_t high = word >> 16;
  low = (low | (low << 8)) & 0x00ff00ff;
  high = (high | (high << 8)) & 0x00ff00ff;
  low = (low | (low << 4)) & 0x0f0f0f0f;
  high = (high | (high << 4)) & 0x0f0f0f0f;
  return low | (high << 4);
}

constexpr uint32_t gather(uint32_t lane) {
  uint32_t low = lane & 0x0f0f0f0f;
  uint32_t high = (lane >> 4) & 0x0f0f0f0f;
  low = (low | (low >> 4)) & 0x00ff00ff;
  high = (high | (high >> 4)) & 0x00ff00ff;
  low = (low | (low >> 8)) & 0xffff;
  high = (high | (high >> 8)) & 0xffff;
  return low | (high << 16);
}

static_assert(spread(0x76543210) == 0x73625140);
static_assert(gather(spread(0xfedcba98)) == 0xfedcba98);

// The matrix rows that make up one row block: 16 for each half.
template <class Matrix>
struct RowBlock {
  const Matrix* half[2];
  int first_row[2];

  auto* words(int row) const {
    const Matrix& m = *half[row / kHalfBlock];
    return m.words + int64_t(first_row[row / kHalfBlock] + row % kHalfBlock) * (m.inputs / 8);
  }
  auto* scales(int row) const {
    const Matrix& m = *half[row / kHalfBlock];
    return m.scales + int64_t(first_row[row / kHalfBlock] + row % kHalfBlock) * (m.inputs / kGroup);
  }
};

bool scale_in_range(uint16_t bits) { return ((bits >> 7) & 0xff) < kScaleExponentLimit; }

void pack_row_block(const RowBlock<PackedMatrix>& rows, int groups, uint8_t* out) {
  for (int g = 0; g < groups; ++g, out += kBlockBytes) {
    uint16_t scales[kRowBlock];
    uint32_t lanes[kWordsPerGroup][kRowBlock];
    bool in_range = true;
    for (int row = 0; row < kRowBlock; ++row) {
      const uint16_t scale = rows.scales(row)[g];
      in_range &= scale_in_range(scale);
      scales[2 * (row % kHalfBlock) + row / kHalfBlock] = scale;
      const uint32_t* words = rows.words(row) + g * kWordsPerGroup;
      for (int q = 0; q < kWordsPerGroup; ++q) lanes[q][row] = spread(words[q]);
    }
    if (!in_range) {
      throw WeightError(text("scale of group ", g, " in the rows from ", rows.first_row[0],
                             ": expected a finite number below 256 in magnitude, got a larger one"));
    }
    std::memcpy(out, scales, sizeof(scales));
    std::memcpy(out + kScaleBytes, lanes, sizeof(lanes));
  }
}

void unpack_row_block(const uint8_t* packed, int groups, const RowBlock<MutablePackedMatrix>& rows) {
  for (int g = 0; g < groups; ++g, packed += kBlockBytes) {
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

int64_t row_block_bytes(int inputs) { return int64_t(inputs / kGroup) * kBlockBytes; }

}  // namespace

void pack_l32(const PackedMatrix& matrix, uint8_t* out) {
  for (int block = 0; block < matrix.rows / kRowBlock; ++block) {
    pack_row_block(plain_rows(matrix, block), matrix.inputs / kGroup, out + block * row_block_bytes(matrix.inputs));
  }
}

void unpack_l32(const uint8_t* packed, const MutablePackedMatrix& matrix) {
  for (int block = 0; block < matrix.rows / kRowBlock; ++block) {
    unpack_row_block(packed + block * row_block_bytes(matrix.inputs), matrix.inputs / kGroup,
                     plain_rows(matrix, block));
  }
}

void pack_l32_gate_up(const PackedMatrix& gate, const PackedMatrix& up, uint8_t* out) {
  for (int block = 0; block < gate.rows / kHalfBlock; ++block) {
    pack_row_block(gate_up_rows(gate, up, block), gate.inputs / kGroup, out + block * row_block_bytes(gate.inputs));
  }
}

void unpack_l32_gate_up(const uint8_t* packed, const MutablePackedMatrix& gate, const MutablePackedMatrix& up) {
  for (int block = 0; block < gate.rows / kHalfBlock; ++block) {
    unpack_row_block(packed + block * row_block_bytes(gate.inputs), gate.inputs / kGroup,
                     gate_up_rows(gate, up, block));
  }
}

}  // namespace k2
