// From the checkpoint's rows to layout L32 (see kernels/l32.h) and back, without loss.
#pragma once
#include <cstdint>

#include "kernels/pack_table.h"

namespace k2 {

// A matrix as the checkpoint stores it, or some of its rows; the memory is the caller's.
struct PackedMatrix {
  const uint32_t* words;   // [rows, inputs / 8], nibble i of a word = value of input 8 * word + i, plus 8
  const uint16_t* scales;  // [rows, inputs / 32] bf16
  int rows;
  int inputs;
  int first_row = 0;               // the place of these rows in the whole matrix
  const char* name = "weights";    // for messages
  const char* file = nullptr;      // the same; may be unknown
  // Bytes from each word to what is fetched into the caches while it is packed: a little ahead, or what is read next.
  intptr_t fetch = kFetchAhead;
};

struct MutablePackedMatrix {
  uint32_t* words;
  uint16_t* scales;
  int rows;
  int inputs;
};

// Consecutive groups of 32 inputs: all of a matrix, or the part that one NUMA node holds.
struct GroupRange {
  int first;
  int count;
};

// Writes the blocks of these groups, rows / 32 * groups.count * 576 bytes, to `out`, which is 64-byte aligned, and
// returns their checksum (moe/l32_digest.h). rows, first_row and inputs are multiples of 32.
// Throws WeightError, naming the matrix, the row and the group, for a scale that is not finite or at least 256 in
// magnitude.
uint64_t pack_l32(const PackTable& packer, const PackedMatrix& matrix, GroupRange groups, uint8_t* out);
void unpack_l32(const uint8_t* packed, GroupRange groups, const MutablePackedMatrix& matrix);

// Gate and up fused: 16 rows of each make a row block. Both have the same shape and first row, multiples of 16.
uint64_t pack_l32_gate_up(const PackTable& packer, const PackedMatrix& gate, const PackedMatrix& up, uint8_t* out);
void unpack_l32_gate_up(const uint8_t* packed, const MutablePackedMatrix& gate, const MutablePackedMatrix& up);

}  // namespace k2
