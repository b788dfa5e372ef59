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
#include "kernels/table-inl.h"

}  // namespace

extern const KernelTable exact;
constinit const KernelTable exact = with_kernels<A16Group, A16Group>({
    .name = "portable",
    .numerics = kExact,
    .activations = "A16",
    .peak_operations = kPeakOperations,
    .tuning = {.token_cost = 25},
});

extern const KernelTable bf16;
constinit const KernelTable bf16 = with_kernels<A16Group, A16Group>({
    .name = "portable",
    .numerics = kBf16,
    .activations = "A16 of bf16",
    .peak_operations = kPeakOperations,
    .tuning = {.token_cost = 25},
}, pack_hidden_fp32<A16Group>);

}  // namespace k2::portable
