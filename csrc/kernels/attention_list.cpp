#include "kernels/attention_list.h"

#if defined(K2_BUILT_AVX512_VNNI)
namespace k2::avx512_vnni {
extern const AttentionTable attention_table;
}
#endif

#if defined(K2_BUILT_AVX2)
namespace k2::avx2 {
extern const AttentionTable attention_table;
}
#endif

namespace k2::portable {
extern const AttentionTable attention_table;
}

namespace k2 {

const AttentionTable& find_attention(const std::string& isa) {
  if (isa == "portable") return portable::attention_table;
#if defined(K2_BUILT_AVX2)
  if (isa == "avx2") return avx2::attention_table;
#endif
#if defined(K2_BUILT_AVX512_VNNI)
  return avx512_vnni::attention_table;  // every other instruction set includes it
#else
  return portable::attention_table;
#endif
}

}  // namespace k2
