// One step of a dense kernel: some groups of one row block, for one tile of tokens.
#pragma once
#include "kernels/dense_table.h"

namespace k2 {

struct DenseStep {
  const uint8_t* weights;
  int groups;
  bool begins, ends;  // the row block's first and last step: sums begin at zero; they are complete
  const uint8_t* input;
  ptrdiff_t input_stride;  // bytes
  float* output;
  ptrdiff_t output_stride;  // floats
};

using DenseTile = void (*)(const DenseStep& step);

}  // namespace k2
