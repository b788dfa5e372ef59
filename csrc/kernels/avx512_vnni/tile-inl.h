// The tile on AVX-512, for the forms of activations whose `dot_block` and `add_group` are included before it.

constexpr int kMaxTile = 6;
constexpr bool kTwoStreams = true;  // of two and three tokens: their sums and those of a group take 24 of 32 registers

// [half][token]; half 0 = rows 0..15 of the row block.
template <int N>
struct Tile {
  F32x16 rows[2][N];
};

// Adds one block for N tokens.
template <int N, class Group>
K2_INLINE void add_block(const uint8_t* block, const Group* const (&x)[N], int g, int prefetch, __m512 (&totals)[2][N]) {
  typename Form<Group>::Dot dot[2][N];
  dot_block<N>(block, x, g, prefetch, dot);
  prefetch_line(block, prefetch, 8);
  const __m512i pairs = _mm512_load_si512(block);
#pragma GCC unroll 6
  for (int n = 0; n < N; ++n) {
    add_group(totals[0][n], dot[0][n], strip_scale(pairs, 0), x[n][g]);
    add_group(totals[1][n], dot[1][n], strip_scale(pairs, 1), x[n][g]);
  }
}

template <int T, class Group>
void tile(const uint8_t* weights, int groups, const Group* const (&input)[T], int prefetch, Tile<T>& sums) {
  __m512 totals[2][T];
  for (int t = 0; t < T; ++t) totals[0][t] = totals[1][t] = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
    add_block<T>(weights, input, g, prefetch, totals);
  }
  for (int t = 0; t < T; ++t) {
    sums.rows[0][t] = totals[0][t];
    sums.rows[1][t] = totals[1][t];
  }
}

template <int S, int T, class Group>
void tile_streams(const uint8_t* weights, ptrdiff_t distance, int groups, const Group* const (&input)[T], int prefetch,
                  Tile<T> (&sums)[S]) {
  __m512 totals[S][2][T];
  for (int s = 0; s < S; ++s) {
    for (int t = 0; t < T; ++t) totals[s][0][t] = totals[s][1][t] = _mm512_setzero_ps();
  }
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) add_block<T>(weights + s * distance, input, g, prefetch, totals[s]);
  }
  for (int s = 0; s < S; ++s) {
    for (int t = 0; t < T; ++t) {
      sums[s].rows[0][t] = totals[s][0][t];
      sums[s].rows[1][t] = totals[s][1][t];
    }
  }
}
