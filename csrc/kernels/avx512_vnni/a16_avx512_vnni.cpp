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
#include "kernels/table-inl.h"

}  // namespace

extern const KernelTable exact;
constinit const KernelTable exact = with_kernels<A16Group, A16Group>({
    .name = "avx512_vnni",
    .numerics = kExact,
    .activations = "A16",
    .peak_operations = kPeakOperations / 2,  // two planes
    .tuning = {.token_cost = 0.47f},
});

extern const KernelTable bf16;
constinit const KernelTable bf16 = with_kernels<A16Group, A16Group>({
    .name = "avx512_vnni",
    .numerics = kBf16,
    .activations = "A16 of bf16",
    .peak_operations = kPeakOperations / 2,  // two planes
    .tuning = {.token_cost = 0.47f},
}, pack_hidden_fp32<A16Group>);

}  // namespace k2::avx512_vnni
