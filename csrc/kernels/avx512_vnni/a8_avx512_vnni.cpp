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
#include "kernels/table-inl.h"

}  // namespace

extern const KernelTable fast;
constinit const KernelTable fast = with_kernels<A8Group, A8Group>({
    .name = "avx512_vnni",
    .numerics = kFast,
    .activations = "A8",
    .peak_operations = kPeakOperations,
    .tuning = {.token_cost = 0.29f},
});

}  // namespace k2::avx512_vnni
