#include "kernels/dense_list.h"

#include "kernels/built.h"
#include "kernels/isa_list.h"

namespace k2::avx512_vnni {
extern const DenseTable dense_table;
}
namespace k2::avx2 {
extern const DenseTable dense_table;
}
namespace k2::portable {
extern const DenseTable dense_table;
}

namespace k2 {

const DenseTable& find_dense_table(const std::string& isa) {
  static const DenseTable* const tables[kIsaCount] = {nullptr, nullptr, K2_AVX512_VNNI(dense_table), K2_AVX2(dense_table),
                                                   &portable::dense_table};
  return best_table(tables, find_isa(isa));
}

}  // namespace k2
