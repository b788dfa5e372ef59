// Row blocks times many tokens on AMX: `tdpbf16ps` multiplies a tile of tokens [16, 32] with a tile of weights [32, 16].
//
// One instruction takes 32 inputs, which is one group. Its result is the exact dot product of a group, 16 tokens by 16
// rows; it goes through memory to the vector unit, which multiplies by the scale and adds with the one rounding that A16
// has. So the bits are those of the vector kernels, and a call may use either. The tokens carry their group's 2^k: the
// result times the scale is then the same real number as the integer times the scale times 2^k.
//   B (tmm0, 1)  weights of one group and both halves of a row block: row p = pair of inputs p, lane = row of the matrix.
//                One vector of unpacked nibbles is one such row.
//   A (tmm4, 5)  up to 16 tokens of one group, one row each; two planes, or one where their sum is a bf16 number, as it
//                is for hidden states in bf16.
//   C (tmm6, 7)  results of a half.
// The tokens of a call are brought into the form of A once, before its first row block. While the tile unit multiplies,
// the vector unit adds results of the groups before (after even groups) and unpacks weights of later ones (odd groups).
//
// What decides the speed, measured on a 5th-generation Xeon (Emerald Rapids, 2 vCPU):
//   a result is stored while the next one is computed: right after its product the store waits for it (28 cycles for
//     product and store of one plane where 17 do);
//   what one unit writes the other reads a group or two later, since neither forwards its stores to the other;
//   `vpermw`, which unpacks, takes both vector ports, of which the tile unit uses one; shifts take the other, so values
//     are shifted by products, which go to either;
//   sums are visited once in two groups; everything between the units stays in the L1 cache, so a call has 32 tokens.
//
// Thrown away: four halves at a time (slower from 17 tokens on: the L1 cache), sums in registers over a chunk of groups,
// 64 tokens a call, prefetching the tiles of tokens, results of four groups between the units; A8 on tiles, no faster
// than `vpdpbusd`.
// The scale inside the weights, bf16(q * scale), and sums that stay in C over all groups would save the additions, with
// an error of 3e-3 against 5e-5 and sums in the order of this one instruction.

constexpr int kTileTokens = 16;
constexpr int kTileBytes = 1024;
// The tokens of a call as tiles read them stay in the L2 cache: 32 take 0.9 MB at 7168 inputs in two planes. What is
// passed between the units stays in the L1 cache.
constexpr int kCallTiles = 2;
constexpr int kTileCallTokens = kCallTiles * kTileTokens;
// Tiles multiply so fast that a chunk of 1024 tokens would take no longer than reading the weights.
constexpr int kTileChunk = 4096;
constexpr CallPolicy kTilePolicy = {.tiles_from = 8};  // where nobody has measured the machine

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

using TileRows = float[kTileTokens][16];  // [token][row of the matrix]
using Sums = TileRows[kCallTiles][2];     // [tile][half of a row block]

// What goes between the vector unit and the tiles, in the L1 cache.
struct alignas(64) Stage {
  uint8_t weights[4][2][kTileBytes];  // [group & 3][half]
  Sums results[2];                    // [group & 1]
  TileRows nothing;                   // for the store that has nothing before it
};

constexpr int kTokenGroupBytes = 2 * 64;  // of a token in the form of tiles, in two planes

// The compiler does not know that a tile load reads memory: what was stored before must be there.
K2_INLINE void publish() { __asm__ volatile("" ::: "memory"); }

K2_INLINE void configure_tiles(int tokens_per_tile) {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = 64;
    config.rows[t] = uint8_t(t < 4 ? 16 : tokens_per_tile);
  }
  publish();
  _tile_loadconfig(&config);
}

K2_INLINE __m512 load_i8(const int8_t* x) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

// A token's group as it goes into tiles: each plane times 2^k. Both have at most 8 significant bits, so they are bf16
// numbers.
struct Planes {
  explicit Planes(const A16Group& group) {
    const __m512 unit = _mm512_castsi512_ps(_mm512_set1_epi32(group.exponent + ((127 - kExponentBase) << 23)));
    const __m512 unit256 = _mm512_mul_ps(unit, _mm512_set1_ps(256.0f));
    for (int i = 0; i < 2; ++i) {
      high[i] = _mm512_mul_ps(load_i8(group.high + 16 * i), unit256);
      low[i] = _mm512_mul_ps(load_i8(group.low + 16 * i), unit);
    }
  }

  __m512i pairs_high() const { return to_pairs(high[0], high[1]); }
  __m512i pairs_low() const { return to_pairs(low[0], low[1]); }
  __m512i pairs() const { return to_pairs(_mm512_add_ps(high[0], low[0]), _mm512_add_ps(high[1], low[1])); }

  // The bits of 256 * high + low that a bf16 number lacks.
  __m512i rest() const {
    return _mm512_max_epi32(below_bf16(_mm512_add_ps(high[0], low[0])), below_bf16(_mm512_add_ps(high[1], low[1])));
  }

  static __m512i below_bf16(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff)); }

  __m512 high[2], low[2];
};

// The tokens of a call in the form of tiles.
struct TileTokens {
  // Cut into the fewest tiles of at most 16, of the same number of rows: those of the last tile that no token fills hold
  // what they held, and their results are not read.
  TileTokens(const uint8_t* const* input, int groups, int tokens, uint8_t* scratch)
      : tiles((tokens + kTileTokens - 1) / kTileTokens),
        per_tile((tokens + tiles - 1) / tiles),
        tokens(tokens),
        planes(one_plane(input, groups, tokens) ? 1 : 2),
        rows(scratch) {
    for (int t = 0; t < tokens; ++t) {
      const A16Group* group = reinterpret_cast<const A16Group*>(input[t]);
      uint8_t* row = rows + t / per_tile * step_bytes() + t % per_tile * 64;
      for (int g = 0; g < groups; ++g, row += tiles * step_bytes()) {
        const Planes values(group[g]);
        _mm512_store_si512(row, planes == 1 ? values.pairs() : values.pairs_high());
        if (planes == 2) _mm512_store_si512(row + kTileBytes, values.pairs_low());
      }
    }
  }

  int step_bytes() const { return planes * kTileBytes; }
  const uint8_t* step(int g, int tile) const { return rows + (size_t(g) * tiles + tile) * step_bytes(); }
  int in_tile(int tile) const { return tile + 1 < tiles ? per_tile : tokens - tile * per_tile; }

  const int tiles, per_tile, tokens, planes;
  uint8_t* const rows;  // [group][tile][plane][token][64]

 private:
  // Whether all values are bf16 numbers, as those of bf16 hidden states are. Others end the search with the first token.
  static bool one_plane(const uint8_t* const* input, int groups, int tokens) {
    for (int t = 0; t < tokens; ++t) {
      const A16Group* group = reinterpret_cast<const A16Group*>(input[t]);
      __m512i rest = _mm512_setzero_si512();
      for (int g = 0; g < groups; ++g) rest = _mm512_max_epi32(rest, Planes(group[g]).rest());
      if (_mm512_reduce_max_epi32(rest) != 0) return false;
    }
    return true;
  }
};

// Pair i of 8 inputs as bf16 weights, as weight_pair: products shift on either port, and the permutation takes both.
K2_INLINE __m512i weight_pair_by_product(__m512i values, int i, __m512i table) {
  return weight_pair(i == 0 ? values : _mm512_mulhi_epu16(values, _mm512_set1_epi16(short(1 << (16 - 4 * i)))), 0, table);
}

K2_INLINE void unpack_half(const uint8_t* block, int half, int prefetch, uint8_t* tile) {
  const __m512i table = nibble_table();
  if (half == 0) prefetch_line(block, prefetch, 0);
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    prefetch_line(block, prefetch, 1 + 2 * q + half);
    const __m512i values = _mm512_load_si512(block + kScaleBytes + q * 128 + half * 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_store_si512(tile + (4 * q + i) * 64, weight_pair_by_product(values, i, table));
    }
  }
}

// Tokens times the weights of half a row block, into a result of its own. Tile numbers must be literals.
template <int Planes, int Half>
K2_INLINE void multiply_tile() {
  if constexpr (Half == 0) {
    _tile_zero(6);
    _tile_dpbf16ps(6, 4, 0);
    if constexpr (Planes == 2) _tile_dpbf16ps(6, 5, 0);
  } else {
    _tile_zero(7);
    _tile_dpbf16ps(7, 4, 1);
    if constexpr (Planes == 2) _tile_dpbf16ps(7, 5, 1);
  }
}

template <int Half>
K2_INLINE void store_result(TileRows& to) {
  publish();
  if constexpr (Half == 0) {
    _tile_stored(6, to, 64);
  } else {
    _tile_stored(7, to, 64);
  }
  publish();
}

K2_INLINE __m512 scales(const uint8_t* block, int half) {
  const __m512i scale = strip_scale(_mm512_load_si512(block), half);
  return _mm512_castsi512_ps(_mm512_add_epi32(scale, _mm512_set1_epi32(kExponentBase << 23)));
}

// One row block times tokens. `sums` have the factor 2^kExponentBase.
template <int Planes>
class Multiply {
 public:
  Multiply(const uint8_t* weights, int groups, const TileTokens& tokens, int prefetch, Stage& stage, Sums& sums)
      : weights_(weights), groups_(groups), tokens_(tokens), prefetch_(prefetch), stage_(stage), sums_(sums) {}

  K2_INLINE void run() {
    for (int t = 0; t < tokens_.tiles; ++t) {
      for (int half = 0; half < 2; ++half) {
        for (int row = 0; row < tokens_.per_tile; ++row) _mm512_store_ps(sums_[t][half][row], _mm512_setzero_ps());
      }
    }
    for (int g = 0; g < 3 && g < groups_; ++g) {
      unpack<0>(g);
      unpack<1>(g);
    }
    for (int g = 0; g < groups_; g += 2) {
      group<0>(g);
      if (g + 1 < groups_) group<1>(g + 1);
    }
    store_result<1>(*last_);
    for (int t = 0; t < tokens_.tiles; ++t) {
      groups_ % 2 == 0 ? add<0, 2>(groups_ - 2, t) : add<0, 1>(groups_ - 1, t);
      groups_ % 2 == 0 ? add<1, 2>(groups_ - 2, t) : add<1, 1>(groups_ - 1, t);
    }
  }

 private:
  template <int Odd>
  K2_INLINE void group(int g) {
    publish();
    _tile_loadd(0, stage_.weights[g & 3][0], 64);
    _tile_loadd(1, stage_.weights[g & 3][1], 64);
    for (int tile = 0; tile < tokens_.tiles; ++tile) {
      const uint8_t* tokens = tokens_.step(g, tile);
      _tile_loadd(4, tokens, 64);
      if constexpr (Planes == 2) _tile_loadd(5, tokens + kTileBytes, 64);
      half<Odd, 0>(g, tile);
      half<Odd, 1>(g, tile);
    }
  }

  // While the tile unit multiplies, the vector unit does what else there is to do for this half.
  template <int Odd, int Half>
  K2_INLINE void half(int g, int tile) {
    multiply_tile<Planes, Half>();
    publish();
    if constexpr (Odd) {
      for (int ahead = tile; ahead < 2; ahead += tokens_.tiles) {
        if (g + 2 + ahead < groups_) unpack<Half>(g + 2 + ahead);
      }
    } else {
      if (g > 0) add<Half, 2>(g - 2, tile);
    }
    store_result<1 - Half>(*last_);
    last_ = &stage_.results[Odd][tile][Half];
  }

  template <int Half>
  K2_INLINE void unpack(int g) {
    unpack_half(weights_ + ptrdiff_t(g) * kBlockBytes, Half, prefetch_, stage_.weights[g & 3][Half]);
  }

  // Adds the results of Count groups from the even one `g` on to the sums of a tile's tokens, in ascending order.
  template <int Half, int Count>
  K2_INLINE void add(int g, int tile) {
    const uint8_t* block = weights_ + ptrdiff_t(g) * kBlockBytes;
    __m512 scale[Count];
    for (int i = 0; i < Count; ++i) scale[i] = scales(block + i * kBlockBytes, Half);
    const int rows = tokens_.in_tile(tile);
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      __m512 sum = _mm512_load_ps(sums_[tile][Half][row]);
#pragma GCC unroll 2
      for (int i = 0; i < Count; ++i) {
        sum = _mm512_fmadd_ps(_mm512_load_ps(stage_.results[i][tile][Half][row]), scale[i], sum);
      }
      _mm512_store_ps(sums_[tile][Half][row], sum);
    }
  }

  const uint8_t* const weights_;
  const int groups_;
  const TileTokens& tokens_;
  const int prefetch_;
  Stage& stage_;
  Sums& sums_;
  TileRows* last_ = &stage_.nothing;  // where the result goes that is being computed
};

K2_INLINE void multiply(const uint8_t* weights, int groups, const TileTokens& tokens, int prefetch, Stage& stage,
                        Sums& sums) {
  if (tokens.planes == 1) {
    Multiply<1>(weights, groups, tokens, prefetch, stage, sums).run();
  } else {
    Multiply<2>(weights, groups, tokens, prefetch, stage, sums).run();
  }
}

uint64_t gate_up_tiles(const GateUpTask& task) {
  const ptrdiff_t row_block = ptrdiff_t(task.groups) * kBlockBytes;
  const TileTokens tokens(task.input, task.groups, task.tokens, task.scratch);
  Stage stage = {};
  alignas(64) Sums sums[2];
  uint64_t bad = 0;
  configure_tiles(tokens.per_tile);
  for (int pair = 0; pair < task.pairs; ++pair) {
    const uint8_t* weights = task.weights + 2 * pair * row_block;
    for (int block = 0; block < 2; ++block) {
      multiply(weights + block * row_block, task.groups, tokens, task.policy.prefetch_many, stage, sums[block]);
    }
    for (int t = 0; t < task.tokens; ++t) {
      const int tile = t / tokens.per_tile, row = t % tokens.per_tile;
      F32x16 h[2];
      for (int block = 0; block < 2; ++block) {
        const F32x16 gate = _mm512_load_ps(sums[block][tile][0][row]), up = _mm512_load_ps(sums[block][tile][1][row]);
        h[block] = mul(silu(unscale(gate)), unscale(up));
      }
      bad |= uint64_t(!pack_group(h[0], h[1], reinterpret_cast<A16Group*>(task.output[t]) + pair)) << t;
    }
  }
  _tile_release();
  return bad;
}

void down_tiles(const DownTask& task) {
  const TileTokens tokens(task.input, task.groups, task.tokens, task.scratch);
  Stage stage = {};
  alignas(64) Sums sums;
  configure_tiles(tokens.per_tile);
  for (int block = 0; block < task.blocks; ++block) {
    multiply(task.weights + block * task.stride_bytes, task.groups, tokens, task.policy.prefetch_many, stage, sums);
    for (int t = 0; t < task.tokens; ++t) {
      const int tile = t / tokens.per_tile, row = t % tokens.per_tile;
      const F32x16 low = _mm512_load_ps(sums[tile][0][row]), high = _mm512_load_ps(sums[tile][1][row]);
      add_rows(low, high, task.factor[t], task.output[t] + block * kRowBlock);
    }
  }
  _tile_release();
}

// Few tokens of an expert go to the vector kernels.
uint64_t gate_up_any(const GateUpTask& task) {
  return task.tokens < task.policy.tiles_from ? gate_up<A16Group, A16Group>(task) : gate_up_tiles(task);
}

void down_any(const DownTask& task) {
  task.tokens < task.policy.tiles_from ? down<A16Group>(task) : down_tiles(task);
}
