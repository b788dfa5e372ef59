// Row blocks times many tokens on AMX: `tdpbf16ps` multiplies a tile of tokens [16, 32] with a tile of weights [32, 16].
//
// One instruction takes 32 inputs, which is one group. Its result is the exact integer dot product of a group, 16 tokens
// by 16 rows; it goes through memory to the vector unit, which multiplies by the scale and adds with the one rounding
// that A16 has. So the bits are those of the vector kernels, and a call may use either.
//   B (tmm0..3)  weights of one group and 4 halves of row blocks: row p = pair of inputs p, lane = row of the matrix.
//                One vector of unpacked nibbles is one such row.
//   A (tmm4, 5)  up to 16 tokens of one group, one row each; two planes where the tokens are in A16 form.
//   C (tmm6, 7)  results of two halves.
//
// Per group, 16 tokens and half, on the port numbers of Intel's optimisation manual for Sapphire Rapids: 16 cycles of the
// tile unit per plane, 16 rows of C stored, 16 sums loaded and stored, 4 rows of A copied (they serve 4 halves): about 36
// store slots, one per cycle, so about 36 cycles for 16384 operations. The unpacking of weights, 16 permutations and 16
// stores, is shared by all tokens of the call. A vector kernel takes 16 cycles per token and half.
//
// Thrown away: the scale inside the weights, bf16(q * scale), and sums that stay in C over all groups. That takes
// about 90 cycles per half and group for the unpacking and 16 per 16 tokens: better only above about 64 tokens of one
// expert, with an error of 3e-3 against 5e-5 for bf16 hidden states, and with sums in the order of this one instruction.
//
// Nothing here was measured: no CPU with AMX was at hand. The kernel runs on a model of the instructions.

constexpr int kTileTokens = 16;
// Where nobody has measured: about 100 cycles per row block and group here, 32 per token in a vector kernel, and twice as
// many operations for two planes as for one.
constexpr CallPolicy kTilePolicy = {.tiles_from = 4};
constexpr int kTileBytes = 1024;

// The operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// What goes between the vector unit and the tiles.
struct alignas(64) Stage {
  uint8_t weights[4][kTileBytes];
  uint8_t tokens[2][kTileBytes];
  float results[4][kTileTokens][16];
};

// [token][half of a row block][row]
template <int Halves>
struct alignas(64) Sums {
  float rows[kMaxTokens][Halves][16];
};

// The compiler does not know that a tile load reads memory: what was stored before must be there.
K2_INLINE void publish() { __asm__ volatile("" ::: "memory"); }

// Most tokens per tile if `tokens` are cut into the fewest tiles: all tiles of a call have the same number of rows.
K2_INLINE int tile_tokens(int tokens) {
  const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
  return (tokens + tiles - 1) / tiles;
}

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

K2_INLINE void unpack_half(const uint8_t* block, int half, uint8_t* tile) {
  const __m512i table = nibble_table();
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512i values = _mm512_load_si512(block + kScaleBytes + q * 128 + half * 64);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_store_si512(tile + (4 * q + i) * 64, weight_pair(values, i, table));
  }
}

template <class Group>
constexpr int kPlanes = 1;
template <>
constexpr int kPlanes<A16Group> = 2;

K2_INLINE void copy_token(const Bf16Group& group, int row, Stage& stage) {
  _mm512_store_si512(stage.tokens[0] + row * 64, _mm512_loadu_si512(group.values));
}

K2_INLINE __m512 load_i8(const int8_t* x) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

// n = 256 * high + low: both terms have at most 8 significant bits.
K2_INLINE void copy_token(const A16Group& group, int row, Stage& stage) {
  const __m512 factor = _mm512_set1_ps(256.0f);
  const __m512 high0 = _mm512_mul_ps(load_i8(group.high), factor);
  const __m512 high1 = _mm512_mul_ps(load_i8(group.high + 16), factor);
  _mm512_store_si512(stage.tokens[0] + row * 64, to_pairs(high0, high1));
  _mm512_store_si512(stage.tokens[1] + row * 64, to_pairs(load_i8(group.low), load_i8(group.low + 16)));
}

// stage.results = tokens times the weights of each half. Tile numbers must be literals.
template <int Halves, int Planes>
K2_INLINE void multiply_tiles(Stage& stage) {
  publish();
  _tile_loadd(4, stage.tokens[0], 64);
  if constexpr (Planes == 2) _tile_loadd(5, stage.tokens[1], 64);
  _tile_zero(6);
  _tile_zero(7);
  _tile_dpbf16ps(6, 4, 0);
  _tile_dpbf16ps(7, 4, 1);
  if constexpr (Planes == 2) {
    _tile_dpbf16ps(6, 5, 0);
    _tile_dpbf16ps(7, 5, 1);
  }
  _tile_stored(6, stage.results[0], 64);
  _tile_stored(7, stage.results[1], 64);
  if constexpr (Halves == 4) {
    _tile_zero(6);
    _tile_zero(7);
    _tile_dpbf16ps(6, 4, 2);
    _tile_dpbf16ps(7, 4, 3);
    if constexpr (Planes == 2) {
      _tile_dpbf16ps(6, 5, 2);
      _tile_dpbf16ps(7, 5, 3);
    }
    _tile_stored(6, stage.results[2], 64);
    _tile_stored(7, stage.results[3], 64);
  }
  publish();
}

template <int Halves>
K2_INLINE void load_weights(const uint8_t* block, ptrdiff_t distance, Stage& stage, __m512i (&scales)[Halves]) {
  for (int half = 0; half < Halves; ++half) {
    const uint8_t* p = block + half / 2 * distance;
    unpack_half(p, half % 2, stage.weights[half]);
    scales[half] = strip_scale(_mm512_load_si512(p), half % 2);
  }
  publish();
  _tile_loadd(0, stage.weights[0], 64);
  _tile_loadd(1, stage.weights[1], 64);
  if constexpr (Halves == 4) {
    _tile_loadd(2, stage.weights[2], 64);
    _tile_loadd(3, stage.weights[3], 64);
  }
}

// Adds one group of all tokens for Halves / 2 row blocks, `distance` bytes apart.
template <int Halves, class Group>
K2_INLINE void add_group_tiles(const uint8_t* block, ptrdiff_t distance, int g, const uint8_t* const* input, int tokens,
                               Stage& stage, Sums<Halves>& sums) {
  __m512i scales[Halves];
  load_weights<Halves>(block, distance, stage, scales);
  const int per_tile = tile_tokens(tokens);
  for (int first = 0; first < tokens; first += per_tile) {
    const int rows = tokens - first < per_tile ? tokens - first : per_tile;
    const auto group = [&](int row) -> const Group& {
      return reinterpret_cast<const Group*>(input[first + row])[g];
    };
    for (int row = 0; row < rows; ++row) copy_token(group(row), row, stage);
    multiply_tiles<Halves, kPlanes<Group>>(stage);
    for (int row = 0; row < rows; ++row) {
      const int32_t exponent = group(row).exponent;
#pragma GCC unroll 4
      for (int half = 0; half < Halves; ++half) {
        float* total = sums.rows[first + row][half];
        __m512 sum = _mm512_load_ps(total);
        add_group(sum, _mm512_load_ps(stage.results[half][row]), scales[half], exponent);
        _mm512_store_ps(total, sum);
      }
    }
  }
}

// Row blocks times tokens; tiles must be configured for them. Rows of `stage` that no token fills keep what they held:
// their results are not read.
template <int Halves, class Group>
K2_INLINE void multiply(const uint8_t* weights, ptrdiff_t distance, int groups, const uint8_t* const* input, int tokens,
                        int prefetch, Stage& stage, Sums<Halves>& sums) {
  for (int t = 0; t < tokens; ++t) {
    for (int half = 0; half < Halves; ++half) _mm512_store_ps(sums.rows[t][half], _mm512_setzero_ps());
  }
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
    if (prefetch) {
      prefetch_block(weights, prefetch);
      if constexpr (Halves == 4) prefetch_block(weights + distance, prefetch);
    }
    add_group_tiles<Halves, Group>(weights, distance, g, input, tokens, stage, sums);
  }
}

template <class Group>
uint64_t gate_up_tiles(const GateUpTask& task) {
  const ptrdiff_t row_block = ptrdiff_t(task.groups) * kBlockBytes;
  Stage stage = {};
  Sums<4> sums;
  uint64_t bad = 0;
  configure_tiles(tile_tokens(task.tokens));
  for (int pair = 0; pair < task.pairs; ++pair) {
    multiply<4, Group>(task.weights + 2 * pair * row_block, row_block, task.groups, task.input, task.tokens,
                       task.policy.prefetch_many, stage, sums);
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
K2_INLINE void down_blocks(const DownTask& task, int block, Stage& stage, Sums<Halves>& sums) {
  multiply<Halves, A16Group>(task.weights + block * task.stride_bytes, task.stride_bytes, task.groups, task.input,
                             task.tokens, task.policy.prefetch_many, stage, sums);
  for (int t = 0; t < task.tokens; ++t) {
    for (int half = 0; half < Halves; half += 2) {
      const F32x16 low = _mm512_load_ps(sums.rows[t][half]), high = _mm512_load_ps(sums.rows[t][half + 1]);
      add_rows(low, high, task.factor[t], task.output[t] + (block + half / 2) * kRowBlock);
    }
  }
}

void down_tiles(const DownTask& task) {
  Stage stage = {};
  Sums<4> sums;
  Sums<2> last;
  configure_tiles(tile_tokens(task.tokens));
  int block = 0;
  for (; block + 2 <= task.blocks; block += 2) down_blocks<4>(task, block, stage, sums);
  if (block < task.blocks) down_blocks<2>(task, block, stage, last);
  _tile_release();
}
