#include "kernels/pack_list.h"

#include "kernels/built.h"
#include "kernels/isa_list.h"

namespace k2::avx512_vnni {
extern const PackTable pack_table;
}

namespace k2 {

const PackTable& find_packer(const std::string& isa) {
  static const PackTable* const tables[kIsaCount] = {nullptr, nullptr, K2_AVX512_VNNI(pack_table), nullptr,
                                                     &portable::pack_table};
  return best_table(tables, find_isa(isa));
}

}  // namespace k2
