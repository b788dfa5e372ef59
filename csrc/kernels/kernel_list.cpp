#include "kernels/kernel_list.h"

#include "core/error.h"
#include "cpu/features.h"

// setup.py defines K2_BUILT_<ISA> for the instruction sets whose files are part of this build.
#if defined(K2_BUILT_AVX512_VNNI)
namespace k2::avx512_vnni {
extern const KernelTable table;
}
#define K2_AVX512_VNNI_TABLE &avx512_vnni::table
#else
#define K2_AVX512_VNNI_TABLE nullptr
#endif

#if defined(K2_BUILT_AVX2)
namespace k2::avx2 {
extern const KernelTable table;
}
#define K2_AVX2_TABLE &avx2::table
#else
#define K2_AVX2_TABLE nullptr
#endif

namespace k2::portable {
extern const KernelTable table;
}

namespace k2 {
namespace {

const KernelEntry kEntries[] = {
    {"avx512_vnni", kAvx2 | kFma | kAvx512F | kAvx512Bw | kAvx512Vl | kAvx512Vnni, K2_AVX512_VNNI_TABLE},
    {"avx2", kAvx2 | kFma, K2_AVX2_TABLE},
    {"portable", 0, &portable::table},
};

}  // namespace

std::span<const KernelEntry> kernel_list() { return kEntries; }

uint32_t missing_features(const KernelEntry& entry) {
  static const uint32_t features = features_of(read_cpuid());
  return entry.required & ~features;
}

const KernelTable& find_table(const std::string& name) {
  for (const KernelEntry& entry : kernel_list()) {
    if (name != entry.name) continue;
    if (!entry.table) throw ArgumentError(text("isa ", name, ": expected a built instruction set, got one left out"));
    if (const uint32_t missing = missing_features(entry)) {
      throw ArgumentError(text("isa ", name, ": expected a CPU with ", feature_names(missing).front(), ", got none"));
    }
    return *entry.table;
  }
  throw ArgumentError(text("isa: expected a known instruction set, got ", name));
}

}  // namespace k2
