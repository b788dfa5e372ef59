// A matrix of a dense layer in the form that the kernels read; see kernels/dense_table.h.
#pragma once
#include <cstdint>
#include <vector>

#include "core/huge_buffer.h"
#include "cpu/pool_layout.h"
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

// Row blocks first..last-1.
struct BlockRange {
  int first, last;
};

// Each NUMA node holds the row blocks that its workers compute, in memory of its own.
class DenseMatrix {
 public:
  // `memory_nodes`: for each node of the workers the NUMA node that its memory is bound to, or kAnyNode. ArgumentError
  // unless rows and inputs are multiples of 32; MemoryError.
  DenseMatrix(int rows, int inputs, bool int8, const WorkerMap& workers, const std::vector<int>& memory_nodes);

  int rows() const { return rows_; }
  int inputs() const { return inputs_; }
  bool int8() const { return int8_; }
  int blocks() const { return rows_ / kDenseRows; }
  int groups() const { return inputs_ / kDenseGroup; }
  size_t bytes() const { return size_t(blocks()) * size_t(row_block_bytes()); }
  int nodes() const { return int(slices_.size()); }
  // A node's row blocks, which follow each other in memory.
  BlockRange range(int node) const { return slices_[node].range; }
  // The memory of each node, for first_touch.
  std::vector<const HugeBuffer*> buffers() const;
  // Whether each slice is on the NUMA node that was asked for; true where none was.
  bool bound() const;

  const uint8_t* block(int index) const { return place(index); }

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

  struct Slice {
    BlockRange range;
    HugeBuffer memory;
  };

  uint8_t* place(int index) const;

  const int rows_, inputs_;
  const bool int8_;
  std::vector<Slice> slices_;
};

}  // namespace k2
