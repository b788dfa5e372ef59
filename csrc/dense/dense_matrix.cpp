#include "dense/dense_matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/bf16.h"
#include "core/error.h"

namespace k2 {
namespace {

constexpr float kTooLarge = 127.0f * 255.5f;  // its scale rounds to 256 in bf16, and scales are below that (a16.h)
constexpr float kSmallestScale = 0x1p-126f;        // below it, exponents cannot be added

float widen(uint16_t bf16) { return std::bit_cast<float>(uint32_t(bf16) << 16); }

// 32 inputs of one row.
void load_group(const PlainRows& source, int64_t at, uint16_t* out) {
  if (source.bf16) {
    std::memcpy(out, static_cast<const uint16_t*>(source.values) + at, kDenseGroup * sizeof(uint16_t));
  } else {
    round_to_bf16(static_cast<const float*>(source.values) + at, kDenseGroup, out);
  }
}

void load_group(const PlainRows& source, int64_t at, float* out) {
  if (source.bf16) {
    const uint16_t* values = static_cast<const uint16_t*>(source.values) + at;
    for (int i = 0; i < kDenseGroup; ++i) out[i] = widen(values[i]);
  } else {
    std::memcpy(out, static_cast<const float*>(source.values) + at, kDenseGroup * sizeof(float));
  }
}

// Refuses a group of one row for its first value that int8 cannot hold.
[[noreturn]] void refuse(const float* values, int row, int first_input) {
  int i = 0;
  while (std::fabs(values[i]) < kTooLarge) ++i;
  throw WeightError(text("weight: expected finite values below ", kTooLarge, " for int8, got ", values[i], " at row ", row,
                         ", input ", first_input + i));
}

// One group of one row: its scale, and its values + 128.
uint16_t quantise(const float* values, int row, int first_input, uint8_t* out) {
  float largest = 0;
  bool fits = true;
  for (int i = 0; i < kDenseGroup; ++i) {
    const float magnitude = std::fabs(values[i]);
    fits &= magnitude < kTooLarge;  // false for NaN
    largest = magnitude > largest ? magnitude : largest;
  }
  if (!fits) refuse(values, row, first_input);
  const uint16_t scale = round_to_bf16(largest / 127.0f);
  if (widen(scale) < kSmallestScale) {
    std::memset(out, 128, kDenseGroup);
    return 0;
  }
  for (int i = 0; i < kDenseGroup; ++i) {
    // To nearest even: adding 1.5 * 2^23 leaves the integer in the low bits of the mantissa.
    const int32_t n = std::bit_cast<int32_t>(values[i] / widen(scale) + 12582912.0f) - 0x4b400000;
    out[i] = uint8_t(128 + (n < -127 ? -127 : n > 127 ? 127 : n));
  }
  return scale;
}

// A group of 32 rows; `at` is the first row's place in the source.
void pack_bf16(const PlainRows& source, int64_t at, int inputs, uint8_t* block) {
  uint32_t pairs[16][kDenseRows];
  for (int row = 0; row < kDenseRows; ++row) {
    uint16_t values[kDenseGroup];
    load_group(source, at + int64_t(row) * inputs, values);
    for (int p = 0; p < 16; ++p) pairs[p][row] = values[2 * p] | uint32_t(values[2 * p + 1]) << 16;
  }
  std::memcpy(block, pairs, kBf16BlockBytes);
}

// `first_row` is the first row's number in the matrix.
void pack_int8(const PlainRows& source, int64_t at, int inputs, int first_row, uint8_t* block) {
  for (int row = 0; row < kDenseRows; ++row) {
    float values[kDenseGroup];
    uint8_t packed[kDenseGroup];
    load_group(source, at + int64_t(row) * inputs, values);
    const uint16_t scale = quantise(values, first_row + row, int(at % inputs), packed);
    std::memcpy(block + 4 * (row % 16) + 2 * (row / 16), &scale, sizeof(scale));
    for (int q = 0; q < 8; ++q) std::memcpy(block + kInt8ScaleBytes + 128 * q + 4 * row, packed + 4 * q, 4);
  }
}

}  // namespace

DenseMatrix::DenseMatrix(int rows, int inputs, bool int8, const WorkerMap& workers, const std::vector<int>& memory_nodes)
    : rows_(rows), inputs_(inputs), int8_(int8) {
  check_argument(rows >= kDenseRows && rows % kDenseRows == 0, "rows", "a multiple of 32", rows);
  check_argument(inputs >= kDenseGroup && inputs % kDenseGroup == 0, "inputs", "a multiple of 32", inputs);
  check_argument(int(memory_nodes.size()) == workers.nodes(), "nodes", text(workers.nodes()), memory_nodes.size());
  for (int node = 0, first = 0; node < workers.nodes(); ++node) {
    const int last = int(int64_t(blocks()) * (workers.first(node) + workers.workers(node)) / workers.workers());
    slices_.push_back({{first, last}, HugeBuffer(size_t(last - first) * size_t(row_block_bytes()), memory_nodes[node])});
    first = last;
  }
}

std::vector<const HugeBuffer*> DenseMatrix::buffers() const {
  std::vector<const HugeBuffer*> buffers;
  for (const Slice& slice : slices_) buffers.push_back(&slice.memory);
  return buffers;
}

bool DenseMatrix::bound() const {
  return std::all_of(slices_.begin(), slices_.end(), [](const Slice& slice) { return slice.memory.bound(); });
}

uint8_t* DenseMatrix::place(int index) const {
  const Slice* slice = &slices_[0];
  while (index >= slice->range.last) ++slice;
  return slice->memory.data() + int64_t(index - slice->range.first) * row_block_bytes();
}

void DenseMatrix::pack(int first, int last, const PlainRows& source) {
  const int block_bytes = int8_ ? kInt8BlockBytes : kBf16BlockBytes;
  for (int block = first; block < last; ++block) {
    uint8_t* target = place(block);
    const int64_t at = int64_t(block - first) * kDenseRows * inputs_;
    for (int g = 0; g < groups(); ++g, target += block_bytes) {
      if (int8_) {
        pack_int8(source, at + g * kDenseGroup, inputs_, block * kDenseRows, target);
      } else {
        pack_bf16(source, at + g * kDenseGroup, inputs_, target);
      }
    }
  }
}

void DenseMatrix::unpack_bf16(uint16_t* out) const {
  for (int row = 0; row < rows_; ++row) {
    const uint8_t* lane = block(row / kDenseRows) + 4 * (row % kDenseRows);
    for (int i = 0; i < inputs_ / 2; ++i) std::memcpy(out + int64_t(row) * inputs_ + 2 * i, lane + 128 * i, 4);
  }
}

void DenseMatrix::unpack_int8(const Int8Rows& out) const {
  for (int row = 0; row < rows_; ++row) {
    for (int g = 0; g < groups(); ++g) {
      const uint8_t* source = block(row / kDenseRows) + int64_t(g) * kInt8BlockBytes;
      std::memcpy(out.scales + int64_t(row) * groups() + g, source + 4 * (row % 16) + 2 * (row % 32 / 16), 2);
      const uint8_t* lane = source + kInt8ScaleBytes + 4 * (row % kDenseRows);
      int8_t* values = out.values + int64_t(row) * inputs_ + g * kDenseGroup;
      for (int i = 0; i < kDenseGroup; ++i) values[i] = int8_t(lane[i / 4 * 128 + i % 4] - 128);
    }
  }
}

}  // namespace k2
