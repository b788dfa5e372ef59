// The tile on AVX2, for the forms of activations whose `add_block`, `one_token` and `add_block_one` are included before it.

constexpr int kMaxTile = 6;
constexpr bool kTwoStreams = false;

// Groups that one token is prepared for at a time: 1.5 KB. One at a time, its broadcasts would wait for the stores.
constexpr int kPrepared = 16;

// [half][token]; half 0 = rows 0..15 of the row block.
template <int N>
struct Tile {
  F32x16 rows[2][N];
};

// Into L2: prefetching into L1 loses 8-30 % on Zen 4.
K2_INLINE void prefetch_block(const uint8_t* block, int ahead) {
  for (int line = 0; line < kBlockBytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(block) + ahead + line, _MM_HINT_T1);
  }
}

template <int T, class Group>
void tile(const uint8_t* weights, int groups, const Group* const (&input)[T], int prefetch, Tile<T>& sums) {
  __m256 strips[4][T];
  for (int s = 0; s < 4; ++s) {
    for (int t = 0; t < T; ++t) strips[s][t] = _mm256_setzero_ps();
  }
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
    if (prefetch) prefetch_block(weights, prefetch);
    add_block<T>(weights, input, g, strips);
  }
  for (int t = 0; t < T; ++t) {
    sums.rows[0][t] = {strips[0][t], strips[1][t]};
    sums.rows[1][t] = {strips[2][t], strips[3][t]};
  }
}

template <int S, class Group>
void tile_streams(const uint8_t* weights, ptrdiff_t distance, int groups, const Group* const (&input)[1], int prefetch,
                  Tile<1> (&sums)[S]) {
  __m256 strips[S][4];
  for (int s = 0; s < S; ++s) {
    for (int strip = 0; strip < 4; ++strip) strips[s][strip] = _mm256_setzero_ps();
  }
  decltype(one_token(**input)) prepared[kPrepared];
  for (int first = 0; first < groups; first += kPrepared) {
    const int count = groups - first < kPrepared ? groups - first : kPrepared;
    for (int g = 0; g < count; ++g) prepared[g] = one_token(input[0][first + g]);
    for (int g = 0; g < count; ++g, weights += kBlockBytes) {
#pragma GCC unroll 1
      for (int s = 0; s < S; ++s) {
        if (prefetch) prefetch_block(weights + s * distance, prefetch);
        add_block_one(weights + s * distance, prepared[g], strips[s]);
      }
    }
  }
  for (int s = 0; s < S; ++s) {
    sums[s].rows[0][0] = {strips[s][0], strips[s][1]};
    sums[s].rows[1][0] = {strips[s][2], strips[s][3]};
  }
}
