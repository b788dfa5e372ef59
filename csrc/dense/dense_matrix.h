// A matrix of a dense layer in the form that the kernels read; see kernels/dense_table.h.
#pragma once
#include <cstdint>

#include "core/huge_buffer.h"
#include "kernels/dense_table.h"

namespace k2 {

// Rows of a matrix as a checkpoint stores them, [rows, inputs]: bf16 bits or fp32.
struct PlainRows {
  const void* values;
  bool bf16;
};

// A matrix that was packed as int8: value * scale, [rows, inputs] and bf16 bits [rows, inputs / 32].
struct Int8Rows {
  int8_t* values;
  uint16_t* scales;
};

class DenseMatrix {
 public:
  // ArgumentError unless rows and inputs are multiples of 32; MemoryError.
  DenseMatrix(int rows, int inputs, bool int8);

  int rows() const { return rows_; }
  int inputs() const { return inputs_; }
  bool int8() const { return int8_; }
  int blocks() const { return rows_ / kDenseRows; }
  int groups() const { return inputs_ / kDenseGroup; }
  size_t bytes() const { return memory_.bytes(); }

  const uint8_t* block(int index) const { return memory_.data() + int64_t(index) * row_block_bytes(); }

  // Row blocks first..last-1 from their plain rows; different blocks may be packed by different threads at once.
  // bf16: fp32 is rounded to nearest even. int8: a group's scale is its largest magnitude / 127 in bf16, its values are
  // rounded to nearest even; WeightError, naming row and input, for a value that is not finite or at least
  // 32448.5.
  void pack(int first, int last, const PlainRows& source);

  // The inverse of each packing.
  void unpack_bf16(uint16_t* out) const;
  void unpack_int8(const Int8Rows& out) const;

 private:
  int64_t row_block_bytes() const { return int64_t(groups()) * (int8_ ? kInt8BlockBytes : kBf16BlockBytes); }

  const int rows_, inputs_;
  const bool int8_;
  HugeBuffer memory_;
};

}  // namespace k2
