// What one instruction set offers for dense layers, as plain pointers; the rules of kernel_table.h hold.
//
// A matrix [rows, inputs] is cut into blocks of 32 rows by 32 inputs (a group), ordered [row block][group], so that a row
// block is one contiguous stream. Lanes are rows, as in layout L32. A block holds, 64 bytes after 64 bytes,
//   bf16, 2048 bytes: for p = 0..15 (2 inputs each) and half = 0..1 (16 rows each) one vector; its 32-bit lane r is row
//                     16*half + r: input 2p in the low and 2p+1 in the high 16 bits, so that `lane << 16` and
//                     `lane & 0xffff0000` are fp32;
//   int8, 1088 bytes: 64 bytes of bf16 scales as in l32.h, then for q = 0..7 (4 inputs each) and half = 0..1 one vector;
//                     byte j of a lane is input 4q+j, as value + 128: unsigned, as `vpdpbusd` wants it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace k2 {

constexpr int kDenseRows = 32;   // of a block
constexpr int kDenseGroup = 32;  // inputs of a block
constexpr int kBf16BlockBytes = 2048;
constexpr int kInt8BlockBytes = 1088;
constexpr int kInt8ScaleBytes = 64;
// Tokens of one call: their rows stay in an L2 cache, a step at a time, and a weight that is read once for so many costs a
// core below 1 GB/s.
constexpr int kDenseTokens = 64;

// output = W . x for `blocks` consecutive row blocks.
struct DenseTask {
  const uint8_t* weights;   // first row block, 64-byte aligned
  int groups;               // inputs / 32
  int blocks;               // row blocks
  int tokens;               // 1..kDenseTokens
  const uint8_t* input;     // [groups][tokens]: 32 values in fp32 for bf16 weights, a packed group for int8
  float* output;            // of the first token and row
  ptrdiff_t output_stride;  // floats from one token's output to the next
  int prefetch_one = 0;     // for one token, bytes ahead of its reads to be asked for into the L2 cache; 0: none
};

struct DensePeak {
  uint64_t (*run)(int64_t rounds);
  int64_t operations;  // multiplications and additions of weights with activations in one round
};

struct DenseTable {
  const char* name;  // instruction set

  // output[row] = sum over the inputs in ascending order, one fma each, from zero: fp32 activations, widened weights.
  void (*bf16)(const DenseTask& task);

  // Numerics A16 (see a16.h) with int8 weights: the same fixed-point activations and order of groups. A group's integer
  // is below 2^27, so its conversion to fp32 rounds once.
  void (*int8)(const DenseTask& task);
  int group_bytes;  // one token's group of 32 packed activations
  // Packs `groups` groups of activations, `stride` bytes apart. False if a value has no packed form (NaN, infinity, out of
  // range).
  bool (*pack)(const float* x, int groups, uint8_t* packed, ptrdiff_t stride);

  // Nothing but the instructions that multiply and add, as KernelTable::peak.
  DensePeak bf16_peak, int8_peak;
};

}  // namespace k2
