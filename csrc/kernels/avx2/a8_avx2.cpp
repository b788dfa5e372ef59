// A8, for numerics fast, on AVX2 and FMA: see a8.h.
#include <immintrin.h>

#include "kernels/kernel_file.h"
// after it:
#include "kernels/a8.h"

namespace k2::avx2 {
namespace {

#include "kernels/avx2/lanes-inl.h"
// on it:
#include "kernels/avx2/values-inl.h"
#include "kernels/avx2/a8_block-inl.h"
#include "kernels/avx2/tile-inl.h"
#include "kernels/a8-inl.h"
// on these:
#include "kernels/work-inl.h"
#include "kernels/avx2/probes-inl.h"
#include "kernels/table-inl.h"

}  // namespace

extern const KernelTable fast;
constinit const KernelTable fast = with_kernels<A8Group, A8Group>({
    .name = "avx2",
    .numerics = kFast,
    .activations = "A8",
    .peak_operations = kPeakOperations,
    .tuning = {.token_cost = 0.38f},
});

}  // namespace k2::avx2
