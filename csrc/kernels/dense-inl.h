// The order of work of the dense kernels, one text for all instruction sets.
//
// Included inside the anonymous namespace of each instruction set's file, after its `lanes-inl.h` and its
// `dense_tile-inl.h`, which defines
//   kBf16Tiles[T - 1](step)   T tokens times one row block, `step.groups` groups of it; kBf16Tile is the largest T
//   kBf16Streams(streams)     one token times four row blocks together, or null: one after the other
//   kInt8Tiles, kInt8Tile, kInt8Streams   the same for int8, with Int8Group, one token's group of packed activations, and
//   store_group(n, group)     which packs it
//
// Sums of a step that is not a row block's last wait in fp32, and not in the output, whose rows may all fall into the same
// sets of a cache. Nothing is rounded on the way, so results do not depend on how a batch is cut.

#include "kernels/for_each_tile-inl.h"

// Groups of a step for several tokens: 16 KB of bf16 weights, which an L1 cache keeps beside a tile's rows.
constexpr int kStepGroups = 8;

// Row blocks that take the same step one after the other: what 64 tokens hold of its groups (64 KB in fp32) stays in the
// L2 cache for them. Their whole rows (1.8 MB at 7168 inputs) would not.
constexpr int kStepBlocks = 8;

// What differs between the types of weights.
struct DenseForm {
  int block_bytes;           // weights of a row block's group
  int input_bytes;           // a token's group
  int largest;               // tile
  const DenseTile* tiles;    // [largest] by tokens
  DenseStreamsTile streams;  // or null

  ptrdiff_t row_block(const DenseTask& task) const { return ptrdiff_t(task.groups) * block_bytes; }

  const uint8_t* weights(const DenseTask& task, int block, int group) const {
    return task.weights + block * row_block(task) + ptrdiff_t(group) * block_bytes;
  }

  // The step from `group` on of one row block and of the tokens from `token` on, whose sums are `sums`.
  DenseStep step(const DenseTask& task, int block, int token, int group, float* sums) const {
    const ptrdiff_t stride = ptrdiff_t(task.tokens) * input_bytes;
    return {
        .weights = weights(task, block, group),
        .groups = task.groups - group < kStepGroups ? task.groups - group : kStepGroups,
        .begins = group == 0,
        .ends = group + kStepGroups >= task.groups,
        .input = task.input + group * stride + ptrdiff_t(token) * input_bytes,
        .input_stride = stride,
        .sums = sums,
        .output = task.output + token * task.output_stride + block * kDenseRows,
        .output_stride = task.output_stride,
        .fetch = nullptr,
        .fetch_lines = 0,
    };
  }
};

// Row blocks from `first` on, up to kStepBlocks. A step's weights serve all tiles of tokens before the next step is read.
// The lines of the next are fetched into the L2 cache meanwhile, by each tile and group some: all at once would be more
// than a core can wait for.
K2_INLINE void run_tiles(const DenseForm& form, const DenseTask& task, int first, int blocks) {
  alignas(64) float sums[kStepBlocks][kDenseTokens * kDenseRows];
  const int tiles = (task.tokens + form.largest - 1) / form.largest;
  const int lines = (form.block_bytes / 64 + tiles - 1) / tiles;
  const int end = first + blocks;
  for (int group = 0; group < task.groups; group += kStepGroups) {
    const int next_group = group + kStepGroups;
    for (int block = first; block < end; ++block) {
      const uint8_t* next = block + 1 < end            ? form.weights(task, block + 1, group)
                            : next_group < task.groups ? form.weights(task, first, next_group)
                                                       : form.weights(task, end, 0);
      for_each_tile(task.tokens, form.largest, [&](int token, int size) {
        DenseStep step = form.step(task, block, token, group, sums[block - first] + token * kDenseRows);
        step.fetch = next;
        step.fetch_lines = lines;
        form.tiles[size - 1](step);
        next += step.groups * lines * 64;
      });
    }
  }
}

// Row blocks `first`, `first + distance`, ...: four streams.
K2_INLINE void run_streams(const DenseForm& form, const DenseTask& task, int first, int distance) {
  form.streams({
      .weights = task.weights + first * form.row_block(task),
      .distance = distance * form.row_block(task),
      .groups = task.groups,
      .input = task.input,
      .output = task.output + first * kDenseRows,
      .output_distance = ptrdiff_t(distance) * kDenseRows,
      .prefetch = task.prefetch_one,
  });
}

K2_INLINE void run_dense(const DenseForm& form, const DenseTask& task) {
  const int quarter = task.tokens == 1 && form.streams ? task.blocks / kDenseStreams : 0;
  for (int i = 0; i < quarter; ++i) run_streams(form, task, i, quarter);
  for (int block = kDenseStreams * quarter; block < task.blocks; block += kStepBlocks) {
    const int left = task.blocks - block;
    run_tiles(form, task, block, left < kStepBlocks ? left : kStepBlocks);
  }
}

void dense_bf16(const DenseTask& task) {
  run_dense({kBf16BlockBytes, kDenseGroup * int(sizeof(float)), kBf16Tile, kBf16Tiles, kBf16Streams}, task);
}

void dense_int8(const DenseTask& task) {
  run_dense({kInt8BlockBytes, sizeof(Int8Group), kInt8Tile, kInt8Tiles, kInt8Streams}, task);
}

bool pack_int8_input(const float* x, int groups, uint8_t* packed, ptrdiff_t stride) {
  bool fits = true;
  for (int g = 0; g < groups; ++g, x += kDenseGroup) {
    const FixedPoint n = fixed_point(load_f32(x), load_f32(x + 16));
    fits &= n.fits;
    store_group(n, reinterpret_cast<Int8Group*>(packed + g * stride));
  }
  return fits;
}

// The table of a kernel file.
constexpr DenseTable with_dense_kernels(const char* isa) {
  return {
      .name = isa,
      .bf16 = dense_bf16,
      .int8 = dense_int8,
      .group_bytes = sizeof(Int8Group),
      .pack = pack_int8_input,
      .bf16_peak = kBf16Peak,
      .int8_peak = kInt8Peak,
  };
}
