// A8, for numerics fast, on AVX2 and FMA: see a8.h.
#include <immintrin.h>

#include "kernels/kernel_file.h"
// after it:
#include "kernels/a8.h"

namespace k2::avx2 {
namespace {

#include "kernels/avx2/lanes-inl.h"
// on it:
#include "kernels/avx2/values-inl.h"
#include "kernels/avx2/a8_block-inl.h"
#include "kernels/avx2/tile-inl.h"
#include "kernels/a8-inl.h"
// on these:
#include "kernels/work-inl.h"
#include "kernels/avx2/probes-inl.h"

}  // namespace

extern const KernelTable fast;
const KernelTable fast = {
    .name = "avx2",
    .numerics = kFast,
    .activations = "A8",
    .layout_id = kLayoutL32,
    .max_tokens = kMaxTokensPerCall,
    .group_bytes = sizeof(A8Group),
    .pack_fp32 = pack_rows<A8Group, float>,
    .pack_bf16 = pack_rows<A8Group, uint16_t>,
    .gate_up = gate_up<A8Group, A8Group>,
    .down = down<A8Group>,
    .read = read,
    .peak = peak,
    .peak_operations = kPeakOperations,
};

}  // namespace k2::avx2
