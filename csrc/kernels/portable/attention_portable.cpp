// Attention in plain C++: the definition, for tests. The library's fmaf makes it slow on x86; torch is used there.
#include "kernels/attention.h"
#include "kernels/kernel_file.h"

namespace k2::portable {
namespace {

#include "kernels/portable/lanes-inl.h"

constexpr int kTileRows = 6;
constexpr int kTilePanels = 1;

#include "kernels/attention-inl.h"

}  // namespace

extern const AttentionTable attention_table;
const AttentionTable attention_table = {
    .name = "portable",
    .absorb = absorb,
    .attend = attend,
    .merge = merge,
    .expand = expand,
    .peak = peak,
    .peak_operations = kPeakOperations,
};

}  // namespace k2::portable
