// What one instruction set offers for bringing weights into layout L32 (see l32.h), as plain pointers; the rules of
// kernel_table.h hold.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "kernels/a16.h"
#include "kernels/l32.h"

namespace k2 {

constexpr int kWordsPerGroup = 4;                          // of one row; see PackedMatrix
constexpr int kTileGroups = 4;                             // packed together: their words of a row fill a cache line
constexpr intptr_t kFetchAhead = 256;                      // bytes: no prefetcher of a CPU follows 32 streams
constexpr int16_t kScaleLimit = kScaleExponentLimit << 7;  // the least magnitude, in bf16 bits, that is too large
constexpr int16_t kScaleMagnitude = 0x7fff;                // without the sign

// 32 rows of kTileGroups consecutive groups as the checkpoint stores them, at any address: 16 rows for each half.
struct TileRows {
  const uint32_t* words[2];   // the first row of each half, kTileGroups * kWordsPerGroup words
  const uint16_t* scales[2];  // the same, kTileGroups bf16
  ptrdiff_t words_stride;     // from one row of a half to the next
  ptrdiff_t scales_stride;
  // Bytes from each row's words to the line that is fetched into the caches meanwhile; nothing has to be there.
  intptr_t fetch[2] = {kFetchAhead, kFetchAhead};
};

// Of the 16-byte words of a block in their order, as two 64-bit lanes modulo 2^64: their sum, and the sum of the sums up
// to each of them. A block's checksum is made of these (moe/l32_digest.h).
struct BlockSums {
  uint64_t plain[2], running[2];
};

struct PackTable {
  const char* name;  // instruction set

  // Writes kTileGroups blocks to `blocks`, which is 64-byte aligned, past the caches, for nothing reads them soon, and
  // their sums to `sums` [kTileGroups]. False for a scale that is not finite or too large; the blocks are worth nothing
  // then. Whoever shows the blocks to another thread puts a store fence between.
  bool (*tile)(const TileRows& rows, uint8_t* blocks, BlockSums* sums);
};

}  // namespace k2
