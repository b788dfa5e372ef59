#include "kernels/kernel_list.h"

#include <algorithm>

#include "core/error.h"
#include "cpu/features.h"

// Kernel files export tables, named after their numerics in the namespace of their instruction set. setup.py defines
// K2_BUILT_<ISA> for the instruction sets whose files are part of this build.
#define K2_DECLARE(isa, numerics)       \
  namespace k2::isa {                   \
  extern const KernelTable numerics;    \
  }

#if defined(K2_BUILT_AMX_BF16)
K2_DECLARE(amx_bf16, exact)
K2_DECLARE(amx_bf16, bf16)
#define K2_AMX_BF16(numerics) &amx_bf16::numerics
#else
#define K2_AMX_BF16(numerics) nullptr
#endif

#if defined(K2_BUILT_AVX512_BF16)
K2_DECLARE(avx512_bf16, bf16)
#define K2_AVX512_BF16(numerics) &avx512_bf16::numerics
#else
#define K2_AVX512_BF16(numerics) nullptr
#endif

#if defined(K2_BUILT_AVX512_VNNI)
K2_DECLARE(avx512_vnni, exact)
K2_DECLARE(avx512_vnni, fast)
K2_DECLARE(avx512_vnni, bf16)
#define K2_AVX512_VNNI(numerics) &avx512_vnni::numerics
#else
#define K2_AVX512_VNNI(numerics) nullptr
#endif

#if defined(K2_BUILT_AVX2)
K2_DECLARE(avx2, exact)
K2_DECLARE(avx2, fast)
K2_DECLARE(avx2, bf16)
#define K2_AVX2(numerics) &avx2::numerics
#else
#define K2_AVX2(numerics) nullptr
#endif

K2_DECLARE(portable, exact)
K2_DECLARE(portable, fast)
K2_DECLARE(portable, bf16)

namespace k2 {
namespace {

constexpr uint32_t kNeedsAvx2 = kAvx2 | kFma;
constexpr uint32_t kNeedsAvx512Vnni = kNeedsAvx2 | kAvx512F | kAvx512Bw | kAvx512Vl | kAvx512Vnni;
constexpr uint32_t kNeedsAvx512Bf16 = kNeedsAvx512Vnni | kAvx512Bf16;
constexpr uint32_t kNeedsAmxBf16 = kNeedsAvx512Bf16 | kAmxTile | kAmxBf16 | kAmxPermitted;

// Tables in the order of Numerics: exact, fast, bf16.
const KernelEntry kEntries[] = {
    {"amx_bf16", kNeedsAmxBf16, {K2_AMX_BF16(exact), nullptr, K2_AMX_BF16(bf16)}},
    {"avx512_bf16", kNeedsAvx512Bf16, {nullptr, nullptr, K2_AVX512_BF16(bf16)}},
    {"avx512_vnni", kNeedsAvx512Vnni, {K2_AVX512_VNNI(exact), K2_AVX512_VNNI(fast), K2_AVX512_VNNI(bf16)}},
    {"avx2", kNeedsAvx2, {K2_AVX2(exact), K2_AVX2(fast), K2_AVX2(bf16)}},
    {"portable", 0, {&portable::exact, &portable::fast, &portable::bf16}},
};

constexpr const char* kNumericsNames[kNumericsCount] = {"exact", "fast", "bf16"};

bool built(const KernelEntry& entry) {
  return std::any_of(entry.tables, entry.tables + kNumericsCount, [](const KernelTable* table) { return table; });
}

}  // namespace

std::span<const KernelEntry> kernel_list() { return kEntries; }

uint32_t missing_features(const KernelEntry& entry) {
  return entry.required & ~machine_features();
}

const char* numerics_name(Numerics numerics) { return kNumericsNames[numerics]; }

Numerics find_numerics(const std::string& name) {
  for (int i = 0; i < kNumericsCount; ++i) {
    if (name == kNumericsNames[i]) return Numerics(i);
  }
  throw ArgumentError(text("numerics: expected exact, fast or bf16, got ", name));
}

const KernelTable& find_table(const std::string& isa, Numerics numerics) {
  for (const KernelEntry& entry : kernel_list()) {
    if (isa != entry.name) continue;
    if (!built(entry)) throw ArgumentError(text("isa ", isa, ": expected a built instruction set, got one left out"));
    const KernelTable* table = entry.tables[numerics];
    check_argument(table, "isa", text("one with kernels for numerics ", numerics_name(numerics)), isa);
    if (const uint32_t missing = missing_features(entry)) {
      throw ArgumentError(text("isa ", isa, ": expected a CPU with ", feature_names(missing).front(), ", got none"));
    }
    return *table;
  }
  throw ArgumentError(text("isa: expected a known instruction set, got ", isa));
}

}  // namespace k2
