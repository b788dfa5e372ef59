// A16, for numerics exact and bf16, on AVX2 and FMA: every x86 server and desktop CPU since 2013 (Intel) and 2015 (AMD).
#include <immintrin.h>

#include "kernels/kernel_file.h"

namespace k2::avx2 {
namespace {

#include "kernels/avx2/lanes-inl.h"
// on it:
#include "kernels/avx2/values-inl.h"
#include "kernels/avx2/a16_block-inl.h"
#include "kernels/avx2/tile-inl.h"
#include "kernels/a16-inl.h"
#include "kernels/avx2/a16_pack-inl.h"
// on these:
#include "kernels/bf16-inl.h"
#include "kernels/work-inl.h"
#include "kernels/avx2/probes-inl.h"
#include "kernels/table-inl.h"

}  // namespace

extern const KernelTable exact;
constinit const KernelTable exact = with_kernels<A16Words, A16Words>({
    .name = "avx2",
    .numerics = kExact,
    .activations = "A16",
    .words = true,
    .peak_operations = kPeakOperations,
    .tuning = {.token_cost = 0.62f},
});

extern const KernelTable bf16;
constinit const KernelTable bf16 = with_kernels<A16Words, A16Words>({
    .name = "avx2",
    .numerics = kBf16,
    .activations = "A16 of bf16",
    .words = true,
    .peak_operations = kPeakOperations,
    .tuning = {.token_cost = 0.62f},
}, pack_hidden_fp32<A16Words>);

}  // namespace k2::avx2
