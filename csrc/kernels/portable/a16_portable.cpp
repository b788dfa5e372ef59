// A16, for numerics exact and bf16, in plain C++ for every CPU: the definition, not a fast path: 3 to 4 GOPS on a
// 3.2 GHz Zen 3 core, where AVX2 has 110.
#include "kernels/kernel_file.h"

namespace k2::portable {
namespace {

#include "kernels/portable/lanes-inl.h"
#include "kernels/portable/tile-inl.h"
// on these two:
#include "kernels/a16-inl.h"
#include "kernels/bf16-inl.h"
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
    .pack_fp32 = pack_fp32,
    .pack_bf16 = pack_bf16,
    .gate_up = gate_up,
    .down = down,
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
    .pack_bf16 = pack_bf16,
    .gate_up = gate_up,
    .down = down,
    .read = read,
    .peak = peak,
    .peak_operations = kPeakOperations,
};

}  // namespace k2::portable
