// Attention on AVX2 and FMA.
#include <immintrin.h>

#include "kernels/attention.h"
#include "kernels/kernel_file.h"

namespace k2::avx2 {
namespace {

#include "kernels/avx2/lanes-inl.h"

// 12 of 16 registers hold sums; each step loads 2 vectors and broadcasts 6 numbers for 12 FMAs.
constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;

#include "kernels/attention-inl.h"

}  // namespace

extern const AttentionTable attention_table;
const AttentionTable attention_table = {
    .name = "avx2",
    .absorb = absorb,
    .attend = attend,
    .merge = merge,
    .expand = expand,
    .peak = peak,
    .peak_operations = kPeakOperations,
};

}  // namespace k2::avx2
