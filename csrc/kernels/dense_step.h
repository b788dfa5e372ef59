// One step of a dense kernel: some groups of one row block, for one tile of tokens; or four row blocks for one token.
#pragma once
#include "kernels/dense_table.h"

namespace k2 {

struct DenseStep {
  const uint8_t* weights;
  int groups;
  bool begins, ends;        // the row block's first and last step: sums begin at zero; they are complete
  const uint8_t* input;     // of the tile's first token; the others follow it
  ptrdiff_t input_stride;   // bytes from one group to the next
  float* sums;              // [tokens][kDenseRows] between the steps
  float* output;            // where the last one leaves them
  ptrdiff_t output_stride;  // floats
  const uint8_t* fetch;     // lines of later weights, to be fetched meanwhile,
  int fetch_lines;          // so many with each group
};

using DenseTile = void (*)(const DenseStep& step);

// One token and kDenseStreams whole row blocks: address streams that the hardware prefetchers follow side by side.
constexpr int kDenseStreams = 4;

struct DenseStreams {
  const uint8_t* weights;  // of the first row block
  ptrdiff_t distance;      // bytes from one row block to the next
  int groups;
  const uint8_t* input;
  float* output;  // of the first row block
  ptrdiff_t output_distance;  // floats from one row block to the next
  int prefetch;               // as DenseTask::prefetch_one
};

using DenseStreamsTile = void (*)(const DenseStreams& streams);

}  // namespace k2
