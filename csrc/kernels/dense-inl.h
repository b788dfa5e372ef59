// The order of work of the dense kernels, one text for all instruction sets.
//
// Included inside the anonymous namespace of each instruction set's file, after its `lanes-inl.h` and its
// `dense_tile-inl.h`, which defines
//   kBf16Tiles[T - 1](step)   T tokens times one row block, `step.groups` groups of it; kBf16Tile is the largest T
//   kInt8Tiles, kInt8Tile     the same for int8, with Int8Group, one token's group of packed activations, and
//   store_group(n, group)     which packs it
//
// Sums of a step that is not a row block's last stay in the output, as fp32: nothing is rounded on the way, so results
// do not depend on how a batch is cut.

constexpr int kDenseStreams = 4;  // address streams, as for the experts: the hardware prefetchers follow all of them
constexpr int kStepGroups = 8;    // groups of a step for several tokens: 16 KB of bf16 weights, which an L1 cache keeps
constexpr int kOneStepGroups = 2;  // for one tile of tokens, where nothing is used again: streams advance side by side

// Cuts `tokens` into the fewest tiles of at most `largest`, as equal as they go.
template <class Run>
K2_INLINE void for_each_dense_tile(int tokens, int largest, Run run) {
  const int tiles = (tokens + largest - 1) / largest;
  for (int i = 0, first = 0; i < tiles; ++i) {
    const int size = tokens / tiles + (i < tokens % tiles);
    run(first, size);
    first += size;
  }
}

// What differs between the types of weights.
struct DenseForm {
  int block_bytes;        // weights of a row block's group
  int input_bytes;        // a token's group
  int largest;            // tile
  const DenseTile* tiles;  // [largest] by tokens
};

// Row blocks `first`, `first + distance`, ...: S streams. A step's weights serve all tiles of tokens before the next
// step is read.
template <int S>
void dense_streams(const DenseForm& form, const DenseTask& task, int first, int distance) {
  const int groups = task.tokens <= form.largest ? kOneStepGroups : kStepGroups;
  const ptrdiff_t row_block = ptrdiff_t(task.groups) * form.block_bytes;
  for (int g = 0; g < task.groups; g += groups) {
    for_each_dense_tile(task.tokens, form.largest, [&](int token, int size) {
      for (int s = 0; s < S; ++s) {
        const int block = first + s * distance;
        form.tiles[size - 1]({
            .weights = task.weights + block * row_block + ptrdiff_t(g) * form.block_bytes,
            .groups = task.groups - g < groups ? task.groups - g : groups,
            .begins = g == 0,
            .ends = g + groups >= task.groups,
            .input = task.input + token * task.input_stride + ptrdiff_t(g) * form.input_bytes,
            .input_stride = task.input_stride,
            .output = task.output + token * task.output_stride + block * kDenseRows,
            .output_stride = task.output_stride,
        });
      }
    });
  }
}

K2_INLINE void run_dense(const DenseForm& form, const DenseTask& task) {
  const int quarter = task.blocks / kDenseStreams;
  for (int i = 0; i < quarter; ++i) dense_streams<kDenseStreams>(form, task, i, quarter);
  for (int block = kDenseStreams * quarter; block < task.blocks; ++block) dense_streams<1>(form, task, block, 0);
}

void dense_bf16(const DenseTask& task) {
  run_dense({kBf16BlockBytes, kDenseGroup * int(sizeof(float)), kBf16Tile, kBf16Tiles}, task);
}

void dense_int8(const DenseTask& task) {
  run_dense({kInt8BlockBytes, sizeof(Int8Group), kInt8Tile, kInt8Tiles}, task);
}

bool pack_int8_input(const float* x, int groups, uint8_t* packed) {
  Int8Group* group = reinterpret_cast<Int8Group*>(packed);
  bool fits = true;
  for (int g = 0; g < groups; ++g, x += kDenseGroup) {
    const FixedPoint n = fixed_point(load_f32(x), load_f32(x + 16));
    fits &= n.fits;
    store_group(n, group + g);
  }
  return fits;
}
