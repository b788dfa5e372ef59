// How a call's tokens are cut into tiles, one text for all instruction sets, experts and dense layers. No include guard: it
// has no meaning outside the anonymous namespace of a kernel file.

// Calls run(first token, size) for the fewest tiles of at most `largest`, as equal as they go: with 6, 7 is 4 + 3, not
// 6 + 1, because a tile of one costs as much memory traffic as a tile of three.
template <class Run>
K2_INLINE void for_each_tile(int tokens, int largest, Run run) {
  const int tiles = (tokens + largest - 1) / largest;
  for (int i = 0, first = 0; i < tiles; ++i) {
    const int size = tokens / tiles + (i < tokens % tiles);
    run(first, size);
    first += size;
  }
}
