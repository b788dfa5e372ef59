// A16 and bf16 on AMX: Intel servers since Sapphire Rapids. Few tokens of an expert run on AVX-512, with the same bits.
#include <immintrin.h>

#include "kernels/kernel_file.h"
// after it:
#include "kernels/bf16.h"

namespace k2::amx_bf16 {
namespace {

#include "kernels/avx512_vnni/lanes-inl.h"
#include "kernels/avx512_vnni/values-inl.h"
#include "kernels/avx512_vnni/a16_block-inl.h"
#include "kernels/avx512_bf16/block-inl.h"
#include "kernels/avx512_vnni/tile-inl.h"
#include "kernels/a16-inl.h"
// on these:
#include "kernels/bf16-inl.h"
#include "kernels/work-inl.h"
#include "kernels/avx512_vnni/read-inl.h"
// on all of these:
#include "kernels/amx_bf16/multiply-inl.h"
#include "kernels/amx_bf16/probes-inl.h"
#include "kernels/table-inl.h"

}  // namespace

extern const KernelTable exact;
constinit const KernelTable exact = with_kernels<A16Group, A16Group>({
    .name = "amx_bf16",
    .numerics = kExact,
    .activations = "A16",
    .max_tokens = kTileCallTokens,
    .chunk_tokens = kTileChunk,
    .scratch_group_bytes = kTokenGroupBytes,
    .peak_operations = kPeakOperations * 3 / 4,  // of bf16 hidden states: one plane for gate and up, two for down
    .has_tiles = true,
    .tuning = {.policy = kTilePolicy, .token_cost = 0.25f},
}, pack_rows<A16Group, float>, gate_up_any, down_any);

extern const KernelTable bf16;
constinit const KernelTable bf16 = with_kernels<A16Group, A16Group>({
    .name = "amx_bf16",
    .numerics = kBf16,
    .activations = "A16 of bf16",
    .max_tokens = kTileCallTokens,
    .chunk_tokens = kTileChunk,
    .scratch_group_bytes = kTokenGroupBytes,
    .peak_operations = kPeakOperations * 3 / 4,  // one plane for gate and up, two for down
    .has_tiles = true,
    .tuning = {.policy = kTilePolicy, .token_cost = 0.2f},
}, pack_hidden_fp32<A16Group>, gate_up_any, down_any);

}  // namespace k2::amx_bf16
