// A8, for numerics fast, in plain C++: see a8.h.
#include "kernels/kernel_file.h"
// after it:
#include "kernels/a8.h"

namespace k2::portable {
namespace {

#include "kernels/portable/lanes-inl.h"
// on it:
#include "kernels/portable/a8_block-inl.h"
#include "kernels/portable/tile-inl.h"
#include "kernels/a8-inl.h"
// on these:
#include "kernels/work-inl.h"
#include "kernels/portable/probes-inl.h"
#include "kernels/table-inl.h"

}  // namespace

extern const KernelTable fast;
constinit const KernelTable fast = with_kernels<A8Group, A8Group>({
    .name = "portable",
    .numerics = kFast,
    .activations = "A8",
    .peak_operations = kPeakOperations,
    .tuning = {.token_cost = 25},
});

}  // namespace k2::portable
