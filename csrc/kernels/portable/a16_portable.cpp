// A16, for numerics exact and bf16, in plain C++ for every CPU: the definition, not a fast path: 3 to 4 GOPS on a
// 3.2 GHz Zen 3 core, where AVX2 has 110.
#include "kernels/kernel_file.h"

namespace k2::portable {
namespace {

#include "kernels/portable/lanes-inl.h"
// on it:
#include "kernels/portable/a16_block-inl.h"
#include "kernels/portable/tile-inl.h"
#include "kernels/a16-inl.h"
// on these:
#include "kernels/bf16-inl.h"
#include "kernels/work-inl.h"
#include "kernels/portable/probes-inl.h"

}  // namespace

extern const KernelTable exact;
const KernelTable exact = {
    .name = "portable",
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
    .peak_operations = kPeakOperations,
};

extern const KernelTable bf16;
const KernelTable bf16 = {
    .name = "portable",
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
    .peak_operations = kPeakOperations,
};

}  // namespace k2::portable
