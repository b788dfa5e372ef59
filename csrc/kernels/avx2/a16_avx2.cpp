// A16, for numerics exact and bf16, on AVX2 and FMA: every x86 server and desktop CPU since 2013 (Intel) and 2015 (AMD).
#include <immintrin.h>

#include "kernels/kernel_file.h"

namespace k2::avx2 {
namespace {

#include "kernels/avx2/lanes-inl.h"
#include "kernels/avx2/tile-inl.h"
// on these two:
#include "kernels/a16-inl.h"
#include "kernels/bf16-inl.h"
#include "kernels/avx2/probes-inl.h"

}  // namespace

extern const KernelTable exact;
const KernelTable exact = {
    .name = "avx2",
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
    .peak_operations = kPeakOperations / 2,  // two planes
};

extern const KernelTable bf16;
const KernelTable bf16 = {
    .name = "avx2",
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
    .peak_operations = kPeakOperations / 2,  // two planes
};

}  // namespace k2::avx2
