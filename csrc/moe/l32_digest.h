// A checksum of weights in layout L32, cheap enough to be computed while they are packed.
//
// Each block has a digest of its bytes, its matrix and its place there; the checksum of any set of blocks is the sum of
// their digests modulo 2^64. So it does not depend on the order of packing, the threads, or how the blocks are spread
// over memory. A change within one aligned 64-bit word is always noticed; any other with a chance of 1 - 2^-64.
// It is no defence against a forger.
#pragma once
#include <cstdint>

#include "kernels/pack_table.h"

namespace k2 {

enum class L32Matrix : uint64_t { kGateUp = 1, kDown = 2 };

// The digest of a block whose sums are known to whoever went over its bytes anyway; index as below.
uint64_t digest_of(const BlockSums& sums, L32Matrix matrix, int64_t index);

// `index` is row block * groups of a row block + group, in the whole matrix.
uint64_t digest_block(const uint8_t* block, L32Matrix matrix, int64_t index);

// Of `blocks` blocks that follow each other.
uint64_t digest_blocks(const uint8_t* blocks, L32Matrix matrix, int64_t first_index, int64_t count);

// The checksum of a whole expert as one node would hold it.
uint64_t digest_expert(const uint8_t* w13, const uint8_t* w2, int64_t w13_bytes, int64_t w2_bytes);

}  // namespace k2
