// A16, for numerics exact and bf16, on AVX-512 with VNNI: Intel servers since Cascade Lake, AMD since Zen 4.
#include <immintrin.h>

#include "kernels/kernel_file.h"

namespace k2::avx512_vnni {
namespace {

#include "kernels/avx512_vnni/lanes-inl.h"
// on it:
#include "kernels/avx512_vnni/values-inl.h"
#include "kernels/avx512_vnni/a16_block-inl.h"
#include "kernels/avx512_vnni/tile-inl.h"
#include "kernels/a16-inl.h"
// on these:
#include "kernels/bf16-inl.h"
#include "kernels/work-inl.h"
#include "kernels/avx512_vnni/probes-inl.h"
#include "kernels/avx512_vnni/read-inl.h"

}  // namespace

extern const KernelTable exact;
const KernelTable exact = {
    .name = "avx512_vnni",
    .numerics = kExact,
    .activations = "A16",
    .layout_id = kLayoutL32,
    .max_tokens = kMaxTokensPerCall,
    .group_bytes = sizeof(A16Group),
    .pack_fp32 = pack_rows<A16Group, float>,
    .pack_bf16 = pack_rows<A16Group, uint16_t>,
    .gate_up = gate_up<A16Group, A16Group>,
    .down = down<A16Group>,
    .read = read,
    .peak = peak,
    .peak_operations = kPeakOperations / 2,  // two planes
};

extern const KernelTable bf16;
const KernelTable bf16 = {
    .name = "avx512_vnni",
    .numerics = kBf16,
    .activations = "A16 of bf16",
    .layout_id = kLayoutL32,
    .max_tokens = kMaxTokensPerCall,
    .group_bytes = sizeof(A16Group),
    .pack_fp32 = pack_hidden_fp32<A16Group>,
    .pack_bf16 = pack_rows<A16Group, uint16_t>,
    .gate_up = gate_up<A16Group, A16Group>,
    .down = down<A16Group>,
    .read = read,
    .peak = peak,
    .peak_operations = kPeakOperations / 2,  // two planes
};

}  // namespace k2::avx512_vnni
