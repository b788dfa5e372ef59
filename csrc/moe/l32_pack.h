// From the checkpoint's rows to layout L32 (see kernels/l32.h) and back, without loss.
#pragma once
#include <cstdint>

namespace k2 {

// A matrix as the checkpoint stores it; the memory is the caller's.
struct PackedMatrix {
  const uint32_t* words;   // [rows, inputs / 8], nibble i of a word = value of input 8 * word + i, plus 8
  const uint16_t* scales;  // [rows, inputs / 32] bf16
  int rows;
  int inputs;
};

struct MutablePackedMatrix {
  uint32_t* words;
  uint16_t* scales;
  int rows;
  int inputs;
};

// rows and inputs are multiples of 32; out holds rows / 32 * inputs / 32 * 576 bytes.
// Throws WeightError for a scale that is not finite or at least 256 in magnitude.
void pack_l32(const PackedMatrix& matrix, uint8_t* out);
void unpack_l32(const uint8_t* packed, const MutablePackedMatrix& matrix);

// Gate and up fused: 16 rows of each make a row block. Both have the same shape, rows a multiple of 16.
void pack_l32_gate_up(const PackedMatrix& gate, const PackedMatrix& up, uint8_t* out);
void unpack_l32_gate_up(const uint8_t* packed, const MutablePackedMatrix& gate, const MutablePackedMatrix& up);

}  // namespace k2
