#include "kernels/kernel_list.h"

#include <algorithm>

#include "core/error.h"
#include "cpu/features.h"

// Each kernel file exports one table, named after its numerics in the namespace of its instruction set. setup.py defines
// K2_BUILT_<ISA> for the instruction sets whose files are part of this build.
#define K2_DECLARE(isa, numerics)       \
  namespace k2::isa {                   \
  extern const KernelTable numerics;    \
  }

#if defined(K2_BUILT_AVX512_VNNI)
K2_DECLARE(avx512_vnni, exact)
#define K2_AVX512_VNNI(numerics) &avx512_vnni::numerics
#else
#define K2_AVX512_VNNI(numerics) nullptr
#endif

#if defined(K2_BUILT_AVX2)
K2_DECLARE(avx2, exact)
#define K2_AVX2(numerics) &avx2::numerics
#else
#define K2_AVX2(numerics) nullptr
#endif

K2_DECLARE(portable, exact)

namespace k2 {
namespace {

constexpr uint32_t kNeedsAvx2 = kAvx2 | kFma;
constexpr uint32_t kNeedsAvx512Vnni = kNeedsAvx2 | kAvx512F | kAvx512Bw | kAvx512Vl | kAvx512Vnni;

// Tables in the order of Numerics: exact, fast, bf16.
const KernelEntry kEntries[] = {
    {"avx512_vnni", kNeedsAvx512Vnni, {K2_AVX512_VNNI(exact), nullptr, nullptr}},
    {"avx2", kNeedsAvx2, {K2_AVX2(exact), nullptr, nullptr}},
    {"portable", 0, {&portable::exact, nullptr, nullptr}},
};

constexpr const char* kNumericsNames[kNumericsCount] = {"exact", "fast", "bf16"};

bool built(const KernelEntry& entry) {
  return std::any_of(entry.tables, entry.tables + kNumericsCount, [](const KernelTable* table) { return table; });
}

}  // namespace

std::span<const KernelEntry> kernel_list() { return kEntries; }

uint32_t missing_features(const KernelEntry& entry) {
  static const uint32_t features = features_of(read_cpuid());
  return entry.required & ~features;
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
