// bf16 on AVX-512 BF16: AMD since Zen 4, Intel since Cooper Lake. The down projection runs on VNNI: its input is A16.
#include <immintrin.h>

#include "kernels/kernel_file.h"
// after it:
#include "kernels/bf16.h"

namespace k2::avx512_bf16 {
namespace {

#include "kernels/avx512_vnni/lanes-inl.h"
#include "kernels/avx512_vnni/values-inl.h"
#include "kernels/avx512_vnni/a16_block-inl.h"
#include "kernels/avx512_bf16/block-inl.h"
#include "kernels/avx512_vnni/tile-inl.h"
#include "kernels/a16-inl.h"
// on these:
#include "kernels/avx512_bf16/pack-inl.h"
#include "kernels/bf16-inl.h"
#include "kernels/work-inl.h"
#include "kernels/avx512_bf16/probes-inl.h"
#include "kernels/avx512_vnni/read-inl.h"
#include "kernels/table-inl.h"

}  // namespace

extern const KernelTable bf16;
constinit const KernelTable bf16 = with_kernels<Bf16Group, A16Group>({
    .name = "avx512_bf16",
    .numerics = kBf16,
    .activations = "bf16, then A16",
    .peak_operations = kPeakOperations,
    .tuning = {.token_cost = 0.47f},
}, pack_hidden_fp32<Bf16Group>);

}  // namespace k2::avx512_bf16
