// Row blocks times many tokens on AMX: `tdpbf16ps` multiplies a tile of tokens [16, 32] with a tile of weights [32, 16].
//
// One instruction takes 32 inputs, which is one group. Its result is the exact integer dot product of a group, 16 tokens
// by 16 rows; it goes through memory to the vector unit, which multiplies by the scale and adds with the one rounding
// that A16 has. So the bits are those of the vector kernels, and a call may use either.
//   B (tmm0..3)  weights of one group and 4 halves of row blocks: row p = pair of inputs p, lane = row of the matrix.
//                One vector of unpacked nibbles is one such row.
//   A (tmm4, 5)  up to 16 tokens of one group, one row each; two planes, or one where they are bf16 numbers.
//   C (tmm6, 7)  results of two halves.
// The tokens of a call are brought into the form of A once, before its first row block. While the tile unit multiplies,
// the vector unit adds the results of the tile of tokens before and unpacks the weights of the next group. Sums are
// visited once in two groups: their loads and stores cost as much as the additions.
//
// Measured on a 5th-generation Xeon (Emerald Rapids, 2 vCPU), one core, weights in the cache, against the kernels on
// vectors: 0.8x at 4 tokens of an expert, 1.1 to 1.3x at 8, 1.3 to 1.5x at 16, 1.3 to 1.7x at 32: 300 to 370 GOPS of
// the 1100 that the tile unit reaches alone in two planes. The two units share ports: what one does takes time from the
// other, and adding a group's results costs more than multiplying it.
//
// Thrown away: sums that stay in registers over a chunk of groups, which loads the tiles of A and B anew for each half
// (251 GOPS where this has 289); 64 tokens a call, whose tiles leave the L2 cache (200 GOPS); A8 on tiles, 2 to 11 %
// faster than `vpdpbusd` from 16 tokens on. The scale inside the weights, bf16(q * scale), and sums that stay in C over
// all groups would save the additions, with an error of 3e-3 against 5e-5 for bf16 hidden states and sums in the order
// of this one instruction.

constexpr int kTileTokens = 16;
constexpr int kTileBytes = 1024;
// The tokens of a call as tiles read them stay in the L2 cache: 32 take 0.9 MB at 7168 inputs in two planes.
constexpr int kTileCallTokens = 32;
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

// What goes between the vector unit and the tiles, in the L1 cache: of two groups each.
struct alignas(64) Stage {
  uint8_t weights[2][4][kTileBytes];                                         // [group & 1][half]
  float results[2][kTileCallTokens / kTileTokens][4][kTileTokens][16];  // [group & 1][tile][half][token][row]
};

constexpr int kTokenGroupBytes = 2 * 64 + 4;  // of a token in the form of tiles, with its exponent, in two planes

// [token][half of a row block][row]
template <int Halves>
struct alignas(64) Sums {
  float rows[kTileCallTokens][Halves][16];
};

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

// One row of each plane. n = 256 * high + low: both terms have at most 8 significant bits, and so has n itself where it
// stands for a bf16 number.
template <int Planes>
K2_INLINE void copy_token(const A16Group& group, uint8_t* row) {
  const __m512 factor = _mm512_set1_ps(256.0f);
  const __m512 high0 = _mm512_mul_ps(load_i8(group.high), factor);
  const __m512 high1 = _mm512_mul_ps(load_i8(group.high + 16), factor);
  const __m512 low0 = load_i8(group.low), low1 = load_i8(group.low + 16);
  if constexpr (Planes == 1) {
    _mm512_store_si512(row, to_pairs(_mm512_add_ps(high0, low0), _mm512_add_ps(high1, low1)));
  } else {
    _mm512_store_si512(row, to_pairs(high0, high1));
    _mm512_store_si512(row + kTileBytes, to_pairs(low0, low1));
  }
}

// The tokens of a call in the form of tiles.
template <int Planes>
struct TileTokens {
  static constexpr int kStepBytes = Planes * kTileBytes;

  // Cut into the fewest tiles of at most 16, of the same number of rows: those of the last tile that no token fills hold
  // what they held, and their results are not read.
  TileTokens(const uint8_t* const* input, int groups, int tokens, uint8_t* scratch)
      : tiles((tokens + kTileTokens - 1) / kTileTokens),
        per_tile((tokens + tiles - 1) / tiles),
        tokens(tokens),
        rows(scratch),
        exponents(reinterpret_cast<int32_t*>(scratch + size_t(groups) * tiles * kStepBytes)) {
    for (int t = 0; t < tokens; ++t) {
      const A16Group* group = reinterpret_cast<const A16Group*>(input[t]);
      uint8_t* row = rows + t / per_tile * kStepBytes + t % per_tile * 64;
      for (int g = 0; g < groups; ++g, row += tiles * kStepBytes) {
        copy_token<Planes>(group[g], row);
        exponents[g * tokens + t] = group[g].exponent;
      }
    }
  }

  const uint8_t* step(int g, int tile) const { return rows + (size_t(g) * tiles + tile) * kStepBytes; }
  int in_tile(int tile) const { return tile + 1 < tiles ? per_tile : tokens - tile * per_tile; }

  const int tiles, per_tile, tokens;
  uint8_t* const rows;       // [group][tile][plane][token][64]
  int32_t* const exponents;  // [group][token]
};

template <int Planes>
K2_INLINE void load_tokens(const uint8_t* tokens) {
  publish();
  _tile_loadd(4, tokens, 64);
  if constexpr (Planes == 2) _tile_loadd(5, tokens + kTileBytes, 64);
}

// Tokens times the weights of a row block. Tile numbers must be literals.
template <int Block, int Planes>
K2_INLINE void multiply_tiles() {
  _tile_zero(6);
  _tile_zero(7);
  if constexpr (Block == 0) {
    _tile_dpbf16ps(6, 4, 0);
    _tile_dpbf16ps(7, 4, 1);
    if constexpr (Planes == 2) {
      _tile_dpbf16ps(6, 5, 0);
      _tile_dpbf16ps(7, 5, 1);
    }
  } else {
    _tile_dpbf16ps(6, 4, 2);
    _tile_dpbf16ps(7, 4, 3);
    if constexpr (Planes == 2) {
      _tile_dpbf16ps(6, 5, 2);
      _tile_dpbf16ps(7, 5, 3);
    }
  }
  publish();
}

K2_INLINE void store_results(float (*results)[kTileTokens][16]) {
  publish();
  _tile_stored(6, results[0], 64);
  _tile_stored(7, results[1], 64);
  publish();
}

K2_INLINE void unpack_half(const uint8_t* block, int half, uint8_t* tile) {
  const __m512i table = nibble_table();
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512i values = _mm512_load_si512(block + kScaleBytes + q * 128 + half * 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_si512(tile + (4 * q + i) * 64, weight_pair(values, i, table));
  }
}

K2_INLINE void unpack_block(const uint8_t* block, uint8_t (*tiles)[kTileBytes]) {
  unpack_half(block, 0, tiles[0]);
  unpack_half(block, 1, tiles[1]);
}

template <int Halves>
K2_INLINE void load_weights(const uint8_t (&tiles)[4][kTileBytes]) {
  publish();
  _tile_loadd(0, tiles[0], 64);
  _tile_loadd(1, tiles[1], 64);
  if constexpr (Halves == 4) {
    _tile_loadd(2, tiles[2], 64);
    _tile_loadd(3, tiles[3], 64);
  }
}

// Adds the results of Count groups for one row block to the sums of a tile's tokens, in ascending order.
template <int Halves, int Count>
K2_INLINE void add_results(const Stage& stage, int tile, int first_half, const uint8_t* block, const int32_t* exponents,
                           int tokens, int rows, float (*sums)[Halves][16]) {
  __m512i scales[Count][2];
  for (int g = 0; g < Count; ++g) {
    const __m512i pairs = _mm512_load_si512(block + g * kBlockBytes);
    scales[g][0] = strip_scale(pairs, 0);
    scales[g][1] = strip_scale(pairs, 1);
  }
#pragma GCC unroll 4
  for (int row = 0; row < rows; ++row) {
    float* out = sums[row][first_half];
    __m512 sum0 = _mm512_load_ps(out), sum1 = _mm512_load_ps(out + 16);
#pragma GCC unroll 2
    for (int g = 0; g < Count; ++g) {
      const auto& results = stage.results[g][tile];
      const int32_t exponent = exponents[g * tokens + row];
      add_group(sum0, _mm512_load_ps(results[first_half][row]), scales[g][0], exponent);
      add_group(sum1, _mm512_load_ps(results[first_half + 1][row]), scales[g][1], exponent);
    }
    _mm512_store_ps(out, sum0);
    _mm512_store_ps(out + 16, sum1);
  }
}

// Row blocks, `distance` bytes apart, times tokens; tiles must be configured for them.
template <int Halves, int Planes>
K2_INLINE void multiply(const uint8_t* weights, ptrdiff_t distance, int groups, const TileTokens<Planes>& tokens,
                        int prefetch, Stage& stage, Sums<Halves>& sums) {
  constexpr int kBlocks = Halves / 2;
  for (int t = 0; t < tokens.tokens; ++t) {
    for (int half = 0; half < Halves; ++half) _mm512_store_ps(sums.rows[t][half], _mm512_setzero_ps());
  }
  for (int i = 0; i < kBlocks; ++i) unpack_block(weights + i * distance, stage.weights[0] + 2 * i);
  const auto add = [&]<int Count>(int g, int tile, int i) __attribute__((always_inline)) {
    add_results<Halves, Count>(stage, tile, 2 * i, weights + ptrdiff_t(g) * kBlockBytes + i * distance,
                               tokens.exponents + g * tokens.tokens + tile * tokens.per_tile, tokens.tokens,
                               tokens.in_tile(tile), sums.rows + tile * tokens.per_tile);
  };
  for (int g = 0; g < groups; ++g) {
    const uint8_t* block = weights + ptrdiff_t(g) * kBlockBytes;
    load_weights<Halves>(stage.weights[g & 1]);
    for (int tile = 0; tile < tokens.tiles; ++tile) {
      load_tokens<Planes>(tokens.step(g, tile));
#pragma GCC unroll 2
      for (int i = 0; i < kBlocks; ++i) {
        i == 0 ? multiply_tiles<0, Planes>() : multiply_tiles<1, Planes>();
        if (tile == 0 && g + 1 < groups) {
          const uint8_t* next = block + i * distance;
          if (prefetch) prefetch_block(next, prefetch);
          unpack_block(next + kBlockBytes, stage.weights[(g + 1) & 1] + 2 * i);
        }
        // Those of the tile before, of this group and the one before it; of the last tile, with the next group.
        if (g % 2 == 1 && tile > 0) add.template operator()<2>(g - 1, tile - 1, i);
        if (g % 2 == 0 && g > 0 && tile == 0) add.template operator()<2>(g - 2, tokens.tiles - 1, i);
        store_results(stage.results[g & 1][tile] + 2 * i);
      }
    }
  }
  for (int i = 0; i < kBlocks; ++i) {
    if (groups % 2 == 0) {
      add.template operator()<2>(groups - 2, tokens.tiles - 1, i);
    } else {
      for (int tile = 0; tile < tokens.tiles; ++tile) add.template operator()<1>(groups - 1, tile, i);
    }
  }
}

template <int Planes>
uint64_t gate_up_tiles(const GateUpTask& task) {
  const ptrdiff_t row_block = ptrdiff_t(task.groups) * kBlockBytes;
  const TileTokens<Planes> tokens(task.input, task.groups, task.tokens, task.scratch);
  Stage stage = {};
  Sums<4> sums;
  uint64_t bad = 0;
  configure_tiles(tokens.per_tile);
  for (int pair = 0; pair < task.pairs; ++pair) {
    multiply<4, Planes>(task.weights + 2 * pair * row_block, row_block, task.groups, tokens, task.policy.prefetch_many,
                       stage, sums);
    for (int t = 0; t < task.tokens; ++t) {
      F32x16 h[2];
      for (int block = 0; block < 2; ++block) {
        const F32x16 gate = _mm512_load_ps(sums.rows[t][2 * block]), up = _mm512_load_ps(sums.rows[t][2 * block + 1]);
        h[block] = mul(silu(unscale(gate)), unscale(up));
      }
      bad |= uint64_t(!pack_group(h[0], h[1], reinterpret_cast<A16Group*>(task.output[t]) + pair)) << t;
    }
  }
  _tile_release();
  return bad;
}

template <int Halves>
K2_INLINE void down_blocks(const DownTask& task, int block, const TileTokens<2>& tokens, Stage& stage,
                           Sums<Halves>& sums) {
  multiply<Halves, 2>(task.weights + block * task.stride_bytes, task.stride_bytes, task.groups, tokens,
                             task.policy.prefetch_many, stage, sums);
  for (int t = 0; t < task.tokens; ++t) {
    for (int half = 0; half < Halves; half += 2) {
      const F32x16 low = _mm512_load_ps(sums.rows[t][half]), high = _mm512_load_ps(sums.rows[t][half + 1]);
      add_rows(low, high, task.factor[t], task.output[t] + (block + half / 2) * kRowBlock);
    }
  }
}

void down_tiles(const DownTask& task) {
  const TileTokens<2> tokens(task.input, task.groups, task.tokens, task.scratch);
  Stage stage = {};
  Sums<4> sums;
  Sums<2> last;
  configure_tiles(tokens.per_tile);
  int block = 0;
  for (; block + 2 <= task.blocks; block += 2) down_blocks<4>(task, block, tokens, stage, sums);
  if (block < task.blocks) down_blocks<2>(task, block, tokens, stage, last);
  _tile_release();
}

// Few tokens of an expert go to the vector kernels.
template <int Planes>
uint64_t gate_up_any(const GateUpTask& task) {
  return task.tokens < task.policy.tiles_from ? gate_up<A16Group, A16Group>(task) : gate_up_tiles<Planes>(task);
}

void down_any(const DownTask& task) {
  task.tokens < task.policy.tiles_from ? down<A16Group>(task) : down_tiles(task);
}
