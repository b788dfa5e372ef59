// Layout L32 of INT4 weights: every kernel of every instruction set reads this one layout.
//
// A matrix [rows, inputs] is cut into blocks of 32 rows by 32 inputs (one quantisation group) of 576 bytes = 9 cache
// lines, ordered [row block][group], so that a row block is one contiguous stream. A block holds
//   64 bytes   scales: 16-bit word 2i = bf16 scale of row i, word 2i+1 = that of row 16+i (i = 0..15), so that
//              `word32 << 16` and `word32 & 0xffff0000` give two vectors of 16 fp32 scales;
//   512 bytes  values: for q = 0..3 (8 inputs each) and half = 0..1 (16 rows each) one 64-byte vector; its 32-bit lane
//              r is row 16*half + r; byte j of the lane holds input 8q+j in the low and input 8q+4+j in the high
//              nibble, each as value + 8 (0..15).
// Lanes are rows: a dot product needs no horizontal sum and no broadcast scale. Nibbles are unsigned, as the u8 x s8
// instructions want them; the offset of 8 is taken back by one correction per group of activations.
// The size is that of the checkpoint (4.5 bits per weight) and the map is a bijection.
//
// Gate and up are fused ("w13"): rows 0..15 of a block are gate rows, rows 16..31 the matching up rows, so that
// silu(gate) * up happens in registers. Two neighbouring row blocks (a "pair") give 32 intermediate channels: one
// group of the down projection's input.
//
// Plain constants only: this header is included by files that are compiled for one instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace k2 {

constexpr int kGroup = 32;        // inputs that share a scale
constexpr int kRowBlock = 32;     // rows of a block
constexpr int kHalfBlock = 16;    // rows of one 64-byte vector of a block
constexpr int kScaleBytes = 64;   // scales at the head of a block
constexpr int kBlockBytes = 576;  // scales and values

}  // namespace k2
