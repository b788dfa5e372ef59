// Weights and activations as AVX-512 VNNI multiplies them: `vpdpbusd` adds the products of four unsigned nibbles and four
// signed bytes of one plane to a 32-bit lane; a lane is a row.
//
// Nibbles are unpacked by shift and mask: on Zen 4 these run beside the multiplications, GFNI and multishift do not.

// Asks for a line of the block `ahead` bytes on; 0: for none. The nine lines of a block are asked for one by one between
// the multiplications: at once they are more than the fill buffers of a core take beside its loads (Emerald Rapids, 3 to
// 6 tokens: 5 to 6 % of the raw read less). Into L2: prefetching into L1 loses 8-30 % on Zen 4.
K2_INLINE void prefetch_line(const uint8_t* block, int ahead, int line) {
  if (ahead) _mm_prefetch(reinterpret_cast<const char*>(block) + ahead + 64 * line, _MM_HINT_T1);
}

// What a form of activations is multiplied to; see tile-inl.h.
template <class Group>
struct Form {
  using Dot = __m512i;
};

// The values of 8 inputs for one half of the rows, unpacked.
struct Values {
  __m512i first, second;  // inputs 8q..8q+3 and 8q+4..8q+7
};

K2_INLINE Values load_values(const uint8_t* p) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i values = _mm512_load_si512(p);
  return {_mm512_and_si512(values, nibble), _mm512_and_si512(_mm512_srli_epi16(values, 4), nibble)};
}

// sum += values . x, for one plane of 8 inputs.
K2_INLINE void add_products(__m512i& sum, const Values& values, const int8_t* x) {
  sum = _mm512_dpbusd_epi32(sum, values.first, broadcast4(x));
  sum = _mm512_dpbusd_epi32(sum, values.second, broadcast4(x + 4));
}

K2_INLINE __m512i strip_scale(__m512i pairs, int half) {
  return half == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000)));
}
