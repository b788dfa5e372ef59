#include "kernels/dense_list.h"

#include "cpu/features.h"

#if defined(K2_BUILT_AVX512_VNNI)
namespace k2::avx512_vnni {
extern const DenseTable dense_table;
}
#define K2_AVX512_VNNI_DENSE &avx512_vnni::dense_table
#else
#define K2_AVX512_VNNI_DENSE nullptr
#endif

#if defined(K2_BUILT_AVX2)
namespace k2::avx2 {
extern const DenseTable dense_table;
}
#define K2_AVX2_DENSE &avx2::dense_table
#else
#define K2_AVX2_DENSE nullptr
#endif

namespace k2::portable {
extern const DenseTable dense_table;
}

namespace k2 {
namespace {

const DenseEntry kEntries[] = {
    {"avx512_vnni", kAvx2 | kFma | kAvx512F | kAvx512Bw | kAvx512Vl | kAvx512Vnni, K2_AVX512_VNNI_DENSE},
    {"avx2", kAvx2 | kFma, K2_AVX2_DENSE},
    {"portable", 0, &portable::dense_table},
};

}  // namespace

std::span<const DenseEntry> dense_list() { return kEntries; }

const DenseTable& find_dense_table(const std::string& isa) {
  for (const DenseEntry& entry : kEntries) {
    if (isa == entry.name && entry.table) return *entry.table;
  }
  const uint32_t features = features_of(read_cpuid());
  for (const DenseEntry& entry : kEntries) {
    if (entry.table && (entry.required & ~features) == 0) return *entry.table;
  }
  return portable::dense_table;
}

}  // namespace k2
