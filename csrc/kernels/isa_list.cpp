#include "kernels/isa_list.h"

#include "core/error.h"
#include "cpu/features.h"

namespace k2 {
namespace {

struct IsaEntry {
  const char* name;
  uint32_t required;  // Feature bits
};

constexpr uint32_t kNeedsAvx2 = kAvx2 | kFma;
constexpr uint32_t kNeedsAvx512Vnni = kNeedsAvx2 | kAvx512F | kAvx512Bw | kAvx512Vl | kAvx512Vnni;
constexpr uint32_t kNeedsAvx512Bf16 = kNeedsAvx512Vnni | kAvx512Bf16;
constexpr uint32_t kNeedsAmxBf16 = kNeedsAvx512Bf16 | kAmxTile | kAmxBf16 | kAmxPermitted;

constexpr IsaEntry kIsas[kIsaCount] = {
    {"amx_bf16", kNeedsAmxBf16}, {"avx512_bf16", kNeedsAvx512Bf16}, {"avx512_vnni", kNeedsAvx512Vnni},
    {"avx2", kNeedsAvx2},        {"portable", 0},
};

constexpr bool each_includes_the_next() {
  for (int isa = 0; isa + 1 < kIsaCount; ++isa) {
    if (kIsas[isa + 1].required & ~kIsas[isa].required) return false;
  }
  return kIsas[kPortableIsa].required == 0;
}
static_assert(each_includes_the_next());

}  // namespace

const char* isa_name(Isa isa) { return kIsas[isa].name; }

Isa find_isa(const std::string& name) {
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (name == kIsas[isa].name) return Isa(isa);
  }
  throw ArgumentError(text("isa: expected a known instruction set, got ", name));
}

uint32_t missing_features(Isa isa) { return kIsas[isa].required & ~machine_features(); }

}  // namespace k2
