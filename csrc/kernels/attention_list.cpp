#include "kernels/attention_list.h"

#include "kernels/built.h"
#include "kernels/isa_list.h"

namespace k2::avx512_vnni {
extern const AttentionTable attention_table;
}
namespace k2::avx2 {
extern const AttentionTable attention_table;
}
namespace k2::portable {
extern const AttentionTable attention_table;
}

namespace k2 {

const AttentionTable& find_attention(const std::string& isa) {
  static const AttentionTable* const tables[kIsaCount] = {nullptr, nullptr, K2_AVX512_VNNI(attention_table), K2_AVX2(attention_table),
                                                   &portable::attention_table};
  return best_table(tables, find_isa(isa));
}

}  // namespace k2
