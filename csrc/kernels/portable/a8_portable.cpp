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

}  // namespace

extern const KernelTable fast;
const KernelTable fast = {
    .name = "portable",
    .numerics = kFast,
    .activations = "A8",
    .layout_id = kLayoutL32,
    .max_tokens = kMaxTokensPerCall,
    .group_bytes = sizeof(A8Group),
    .pack_fp32 = pack_rows<A8Group, float>,
    .pack_bf16 = pack_rows<A8Group, uint16_t>,
    .gate_up = gate_up<A8Group, A8Group>,
    .down = down<A8Group>,
    .read = read,
    .peak = peak,
    .peak_operations = kPeakOperations,
};

}  // namespace k2::portable
