// Numerics bf16: hidden states enter rounded to bf16, everything after that is A16 (see a16.h).
//
// The fixed-point form of a bf16 value has at most 8 significant bits: it is the value times 2^-k where that is an
// integer, and below 2^7 where it has to be rounded to one. So the integers n of a group are themselves bf16 numbers,
// and so are the weights -8..7. A bf16 instruction multiplies them exactly and adds them exactly in fp32: every partial
// sum is an integer below 32 * 8 * 32512 < 2^23, whatever the order of the additions and wherever they are rounded. No
// partial sum is denormal or infinite either, so the flushing of denormals in these instructions changes nothing.
//
// That makes one plane enough for the hidden state, where A16 takes two, and the result is still the same, bit for bit,
// on every instruction set, with bf16 instructions or without. The intermediate silu(gate) * up is an fp32 number and
// keeps both planes of A16.
#pragma once
#include <stdint.h>

namespace k2 {

// One token's group of 32 hidden values, for the kernels that have bf16 instructions. 72 bytes, as A16Group.
struct Bf16Group {
  uint16_t values[32];  // n in the order of kWordOrder (a16.h)
  int32_t exponent;     // (k + 60) << 23
  int32_t unused;       // zero
};

}  // namespace k2
