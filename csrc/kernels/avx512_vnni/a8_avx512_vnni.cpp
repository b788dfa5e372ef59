// A8, for numerics fast, on AVX-512 with VNNI: see a8.h.
#include <immintrin.h>

#include "kernels/kernel_file.h"
// after it:
#include "kernels/a8.h"

namespace k2::avx512_vnni {
namespace {

#include "kernels/avx512_vnni/lanes-inl.h"
// on it:
#include "kernels/avx512_vnni/values-inl.h"
#include "kernels/avx512_vnni/a8_block-inl.h"
#include "kernels/avx512_vnni/tile-inl.h"
#include "kernels/a8-inl.h"
// on these:
#include "kernels/work-inl.h"
#include "kernels/avx512_vnni/probes-inl.h"
#include "kernels/avx512_vnni/read-inl.h"

}  // namespace

extern const KernelTable fast;
const KernelTable fast = {
    .name = "avx512_vnni",
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

}  // namespace k2::avx512_vnni
