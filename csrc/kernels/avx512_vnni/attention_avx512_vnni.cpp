// Attention on AVX-512.
#include <immintrin.h>

#include "kernels/attention.h"
#include "kernels/kernel_file.h"

namespace k2::avx512_vnni {
namespace {

#include "kernels/avx512_vnni/lanes-inl.h"

// 24 of 32 registers hold sums; each step loads 2 vectors and broadcasts 12 numbers for 24 FMAs.
constexpr int kTileRows = 12;
constexpr int kTilePanels = 2;

#include "kernels/attention-inl.h"

}  // namespace

extern const AttentionTable attention_table;
const AttentionTable attention_table = {
    .name = "avx512_vnni",
    .absorb = absorb,
    .attend = attend,
    .merge = merge,
    .expand = expand,
    .peak = peak,
    .peak_operations = kPeakOperations,
};

}  // namespace k2::avx512_vnni
