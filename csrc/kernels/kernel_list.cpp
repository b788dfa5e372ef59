#include "kernels/kernel_list.h"

#include <algorithm>

#include "core/error.h"
#include "cpu/features.h"
#include "kernels/built.h"

// Kernel files export tables named after their numerics.
namespace k2::amx_bf16 {
extern const KernelTable exact, bf16;
}
namespace k2::avx512_bf16 {
extern const KernelTable bf16;
}
namespace k2::avx512_vnni {
extern const KernelTable exact, fast, bf16;
}
namespace k2::avx2 {
extern const KernelTable exact, fast, bf16;
}
namespace k2::portable {
extern const KernelTable exact, fast, bf16;
}

namespace k2 {
namespace {

// In the order of Isa and of Numerics: exact, fast, bf16.
const KernelTable* const kTables[kIsaCount][kNumericsCount] = {
    {K2_AMX_BF16(exact), nullptr, K2_AMX_BF16(bf16)},
    {nullptr, nullptr, K2_AVX512_BF16(bf16)},
    {K2_AVX512_VNNI(exact), K2_AVX512_VNNI(fast), K2_AVX512_VNNI(bf16)},
    {K2_AVX2(exact), K2_AVX2(fast), K2_AVX2(bf16)},
    {&portable::exact, &portable::fast, &portable::bf16},
};

constexpr const char* kNumericsNames[kNumericsCount] = {"exact", "fast", "bf16"};

bool built(Isa isa) {
  return std::any_of(kTables[isa], kTables[isa] + kNumericsCount, [](const KernelTable* table) { return table; });
}

}  // namespace

const KernelTable* kernel_table(Isa isa, Numerics numerics) { return kTables[isa][numerics]; }

const char* numerics_name(Numerics numerics) { return kNumericsNames[numerics]; }

Numerics find_numerics(const std::string& name) {
  for (int i = 0; i < kNumericsCount; ++i) {
    if (name == kNumericsNames[i]) return Numerics(i);
  }
  throw ArgumentError(text("numerics: expected exact, fast or bf16, got ", name));
}

const KernelTable& find_table(const std::string& name, Numerics numerics) {
  const Isa isa = find_isa(name);
  if (!built(isa)) throw ArgumentError(text("isa ", name, ": expected a built instruction set, got one left out"));
  const KernelTable* table = kernel_table(isa, numerics);
  check_argument(table, "isa", text("one with kernels for numerics ", numerics_name(numerics)), name);
  if (const uint32_t missing = missing_features(isa)) {
    throw ArgumentError(text("isa ", name, ": expected a CPU with ", feature_names(missing).front(), ", got none"));
  }
  return *table;
}

}  // namespace k2
