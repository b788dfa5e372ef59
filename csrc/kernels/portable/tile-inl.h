// The tile in plain C++: what every instruction set must compute, lane by lane. For the forms of activations whose
// `dot_group` and `scale_group` are included before it.

constexpr int kMaxTile = 6;
constexpr bool kTwoStreams = false;

// [half][token]; half 0 = rows 0..15 of the row block.
template <int N>
struct Tile {
  F32x16 rows[2][N];
};

template <int T, class Group>
void tile(const uint8_t* weights, int groups, const Group* const (&input)[T], int /*prefetch*/, Tile<T>& sums) {
  for (int t = 0; t < T; ++t) sums.rows[0][t] = sums.rows[1][t] = f32(0.0f);
  for (int g = 0; g < groups; ++g, weights += kBlockBytes) {
    for (int t = 0; t < T; ++t) {
      for (int half = 0; half < 2; ++half) {
        const I32x16 dot = dot_group(weights + kScaleBytes + half * 64, input[t][g]);
        sums.rows[half][t] = fma(to_f32(dot), scale_group(weights, half, input[t][g]), sums.rows[half][t]);
      }
    }
  }
}

template <int S, class Group>
void tile_streams(const uint8_t* weights, ptrdiff_t distance, int groups, const Group* const (&input)[1], int prefetch,
                  Tile<1> (&sums)[S]) {
  for (int s = 0; s < S; ++s) tile<1>(weights + s * distance, groups, input, prefetch, sums[s]);
}
