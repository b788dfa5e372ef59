// Attention over cached latents in fp32, on vectors of 16 lanes: one text for all instruction sets.
//
// Included inside the anonymous namespace of each instruction set's file, after its `lanes-inl.h`, with
//   kTileRows      rows of a tile of `multiply`; divides kBlockKeys and kContextStep
//   kTilePanels    panels of a tile; divides kPanels. kTileRows * kTilePanels sums stay in registers
//
// A decode step of 64 heads does 121 FMAs per number of the cache that it reads, so the bound is their rate. Scores and
// contexts are the same product with other strides: numbers of the widened latents are broadcast to the lanes, which
// are rows. So nothing is ever summed across lanes, and the softmax needs no shuffles either.
//
// Every sum is a chain of FMAs in ascending order of what it runs over, and each chain belongs to one row. So a row has
// the same bits whatever shares its group, its tile, or its batch, and on every instruction set.
//
// No include guard: it has no meaning outside those namespaces.

#include "kernels/exp-inl.h"

// W_UK is read in the order it lies in memory, so many rows at a time; the sums of a row stay in the L1 cache between.
constexpr int kAbsorbDepth = 16;

// Tokens of a tile of `absorb` and of `expand`, for as long as there are so many.
constexpr int kAbsorbTokens = 4 * kTilePanels;
constexpr int kExpandTokens = kTilePanels == 1 ? 3 : 8;

// Of the queries' panels, so that a tile's 12 to 24 KB stay in the L1 cache while it meets the keys of a block.
constexpr int kScoreDepth = 192;

constexpr float kLowest = -3.40282347e38f;  // below every score, and finite: a difference with it is never NaN

K2_INLINE F32x16 load(const float* x) { return load_f32(x); }
K2_INLINE F32x16 load(const uint16_t* x) { return load_bf16(x); }

// The first n of 16 numbers, then zeros; reads no further.
template <class Number>
K2_INLINE F32x16 load_part(const Number* x, int n) {
  Number part[16] = {};
  for (int i = 0; i < n; ++i) part[i] = x[i];
  return load(part);
}

// exp(x) for x <= 0 and NaN; exactly 0 below -87.7. Relative error below 2^-22 where the result is a normal number.
K2_INLINE F32x16 exp_to_zero(F32x16 x) {
  const Exponential e = exponential(max_f32(f32(-104.0f), x));  // the second operand where x is NaN
  return mul(e.mantissa, power_of_two(max_i32(e.exponent, i32(-127))));
}

// Into the L2 cache, however far it is from what is read now.
K2_INLINE void prefetch(const void* x) { __builtin_prefetch(x, 0, 2); }

// How far on what is read `rows` rows after `x` lies, in numbers. The matrix has `left` rows from `x` on, then comes the
// `next` one; 0 if there is none.
template <class Number>
K2_INLINE ptrdiff_t rows_ahead(const Number* x, int left, int rows, ptrdiff_t width, const void* next) {
  if (left > rows) return rows * width;
  return next ? static_cast<const Number*>(next) - x + (rows - left) * width : 0;
}

// out[row][panel] = start + sum over k < depth of a[row][k] * b[k][panel], strides in numbers.
template <class Number>
struct Product {
  const float* a;
  const Number* b;
  ptrdiff_t b_step, b_panel;
  ptrdiff_t b_ahead;  // from each vector of b to the one to be asked for; 0: none
  int depth;
  float* out;
  ptrdiff_t out_row, out_panel;
};

enum Start { kZero, kAdd, kShrink };

struct Nothing {
  K2_INLINE void operator()(int) const {}
};

// `shrink`: [N][16], what `out` is multiplied by first, for kShrink. The strides of `a` are arguments because one of
// them is the constant 1, which makes for one pointer instead of many. beside(k) is called at each step: what it does
// takes the issue slots that multiplying leaves free.
template <int M, int N, Start kStart, class Number, class Beside = Nothing>
K2_INLINE void multiply_tile(const Product<Number>& p, ptrdiff_t a_row, ptrdiff_t a_step, const float* shrink,
                             Beside&& beside = {}) {
  F32x16 sums[M][N];
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const float* out = p.out + m * p.out_row + n * p.out_panel;
      if (kStart == kZero) sums[m][n] = f32(0.0f);
      if (kStart == kAdd) sums[m][n] = load_f32(out);
      if (kStart == kShrink) sums[m][n] = mul(load_f32(out), load_f32(shrink + n * kPanelRows));
    }
  }
  // Rows are reached from every third one, one or two strides on: a register for each would not be left.
  constexpr int kThirds = (M + 2) / 3;
  const float* a[kThirds];
#pragma GCC unroll 4
  for (int i = 0; i < kThirds; ++i) a[i] = p.a + 3 * i * a_row;
  const Number* b = p.b;
  constexpr int kLinePanels = 64 / (kPanelRows * sizeof(Number));
  for (int k = 0; k < p.depth; ++k) {
    beside(k);
    F32x16 row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      row[n] = load(b + n * p.b_panel);
      if (p.b_ahead && n % kLinePanels == 0) prefetch(b + n * p.b_panel + p.b_ahead);
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const F32x16 x = f32(a[m / 3][m % 3 * a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = fma(x, row[n], sums[m][n]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kThirds; ++i) a[i] += a_step;
    b += p.b_step;
  }
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store_f32(sums[m][n], p.out + m * p.out_row + n * p.out_panel);
  }
}

// ---- absorb ----

// A power of two would put the tokens of one column into few sets of a cache.
K2_INLINE ptrdiff_t absorbed_width(const MlaSizes& s) { return s.context_width + kPanelRows; }

template <int M, int N, class Number>
K2_INLINE void absorb_tile(Product<Number>& p, bool begin) {
  if (begin) {
    multiply_tile<M, N, kZero>(p, 1, M, nullptr);
  } else {
    multiply_tile<M, N, kAdd>(p, 1, M, nullptr);
  }
  p.b += N * p.b_panel;
  p.out += N * p.out_panel;
}

// `panels` vectors of columns of W_UK for M queries, N at a time.
template <int M, int N, class Number>
K2_INLINE void absorb_panels(Product<Number> p, const float* const* q, int panels, bool begin) {
  // Queries lie apart: their stride is not a constant, so they are brought together.
  float a[kAbsorbDepth][M];
  for (int k = 0; k < p.depth; ++k) {
    for (int m = 0; m < M; ++m) a[k][m] = q[m][k];
  }
  p.a = a[0];
  int panel = 0;
  for (; panel + N <= panels; panel += N) absorb_tile<M, N>(p, begin);
  if (N > 1) {
    for (; panel < panels; ++panel) absorb_tile<M, 1>(p, begin);
  }
}

// Columns [0, 16 * panels) of `tokens` queries over rows [n, n + depth) of W_UK, into [tokens][absorbed_width].
template <class Number>
void absorb_rows(const AbsorbTask& task, int head, const Number* w, ptrdiff_t w_step, ptrdiff_t w_ahead, int panels,
                 int n, int depth, float* out) {
  const ptrdiff_t width = absorbed_width(*task.sizes);
  const float* q[kHeadTokens];
  for (int t = 0; t < task.tokens; ++t) q[t] = task.q[t] + ptrdiff_t(head) * (task.sizes->nope + task.sizes->rope) + n;
  Product<Number> p = {nullptr, w, w_step, kPanelRows, w_ahead, depth, out, width, kPanelRows};
  int t = 0;
  for (; t + kAbsorbTokens <= task.tokens; t += kAbsorbTokens, p.out += kAbsorbTokens * width) {
    absorb_panels<kAbsorbTokens, kTilePanels>(p, q + t, panels, n == 0);
  }
  for (; t + 4 <= task.tokens; t += 4, p.out += 4 * width) absorb_panels<4, kTilePanels>(p, q + t, panels, n == 0);
  for (; t < task.tokens; ++t, p.out += width) absorb_panels<1, 4>(p, q + t, panels, n == 0);
}

// One head, into [tokens][absorbed_width]; `next`: W_UK of the head that follows, or null.
template <class Number>
void absorb_head(const AbsorbTask& task, int head, const Number* w, const void* next, float* absorbed) {
  const MlaSizes& s = *task.sizes;
  const int panels = s.kv_lora / kPanelRows, rest = s.kv_lora % kPanelRows;
  for (int n = 0; n < s.nope; n += kAbsorbDepth) {
    const int depth = s.nope - n < kAbsorbDepth ? s.nope - n : kAbsorbDepth;
    const Number* rows = w + ptrdiff_t(n) * s.kv_lora;
    const ptrdiff_t ahead = rows_ahead(rows, s.nope - n, kAbsorbDepth, s.kv_lora, next);
    absorb_rows<Number>(task, head, rows, s.kv_lora, ahead, panels, n, depth, absorbed);
    if (rest == 0) continue;
    const Number* tail = rows + panels * kPanelRows;
    float wide[kAbsorbDepth][kPanelRows];
    for (int k = 0; k < depth; ++k) store_f32(load_part(tail + ptrdiff_t(k) * s.kv_lora, rest), wide[k]);
    absorb_rows<float>(task, head, wide[0], kPanelRows, 0, 1, n, depth, absorbed + panels * kPanelRows);
  }
}

// The lanes of one token's heads, from [H] absorbed queries that lie `step` apart. They are mostly in the same lines.
template <int H>
void write_lanes(const AbsorbTask& task, int token, int head, const float* absorbed, ptrdiff_t step) {
  const MlaSizes& s = *task.sizes;
  const float* rope = task.q[token] + ptrdiff_t(head) * (s.nope + s.rope) + s.nope;
  float* out[H];
  for (int h = 0; h < H; ++h) out[h] = task.out[token * task.heads + head + h];
  for (ptrdiff_t c = 0; c < s.kv_lora; ++c) {
    for (int h = 0; h < H; ++h) out[h][c * kPanelRows] = task.scale * absorbed[h * step + c];
  }
  for (ptrdiff_t r = 0; r < s.rope; ++r) {
    for (int h = 0; h < H; ++h) {
      out[h][(s.kv_lora + r) * kPanelRows] = task.scale * rope[h * (s.nope + s.rope) + r];
    }
  }
}

template <class Number>
void absorb_as(const AbsorbTask& task) {
  const MlaSizes& s = *task.sizes;
  const Number* w = static_cast<const Number*>(task.w_uk);
  const ptrdiff_t w_head = ptrdiff_t(s.nope + s.value) * s.kv_lora;
  const ptrdiff_t width = absorbed_width(s), absorbed_head = task.tokens * width;
  for (int h = 0; h < task.heads; ++h, w += w_head) {
    absorb_head(task, h, w, h + 1 < task.heads ? w + w_head : task.next, task.scratch + h * absorbed_head);
  }
  for (int t = 0; t < task.tokens; ++t) {
    const float* absorbed = task.scratch + t * width;
    if (task.heads == kPartHeads) {
      write_lanes<kPartHeads>(task, t, 0, absorbed, absorbed_head);
    } else {
      for (int h = 0; h < task.heads; ++h) write_lanes<1>(task, t, h, absorbed + h * absorbed_head, 0);
    }
  }
}

void absorb(const AbsorbTask& task) { task.bf16 ? absorb_as<uint16_t>(task) : absorb_as<float>(task); }

// ---- attend ----

// Brings latents into fp32 a vector at a time, beside a tile of scores that needs others: done alone it waits for the L2
// cache, where the widened block goes.
template <class Number>
class Widening {
 public:
  // Columns [first, first + columns) of latents [key, end) that were not widened before.
  Widening(const AttendTask& task, int first, int columns, int key, int end)
      : task_(task),
        first_(first),
        vectors_(columns / kPanelRows),
        rest_(columns % kPanelRows),
        begin_(key < task.widened ? task.widened : key),
        end_(end < task.keys ? end : task.keys),
        key_(vectors_ > 0 ? begin_ : end_) {
    start();
  }

  K2_INLINE void operator()(int) {
    if (key_ >= end_) return;
    store_f32(load(from_), to_);
    from_ += kPanelRows;
    to_ += kPanelRows;
    if (--left_ > 0) return;
    ++key_;
    start();
  }

  // What the tile had too few steps for.
  void finish() {
    while (key_ < end_) (*this)(0);
    if (rest_ == 0) return;
    for (int key = begin_; key < end_; ++key) {
      store_f32(load_part(latent(key) + vectors_ * kPanelRows, rest_), wide(key) + vectors_ * kPanelRows);
    }
  }

 private:
  const Number* latent(int key) const { return static_cast<const Number*>(task_.latents[key]) + first_; }
  float* wide(int key) const { return task_.wide + ptrdiff_t(key) * task_.sizes->latent_stride + first_; }

  K2_INLINE void start() {
    if (key_ >= end_) return;
    from_ = latent(key_);
    to_ = wide(key_);
    left_ = vectors_;
  }

  const AttendTask& task_;
  const int first_, vectors_, rest_, begin_, end_;
  int key_;
  int left_ = 0;  // vectors of the key
  const Number* from_ = nullptr;
  float* to_ = nullptr;
};

// scores[panel][key][16] = latents[key] . q[panel]
template <class Number>
void score(const AttendTask& task, float* scores) {
  const MlaSizes& s = *task.sizes;
  const ptrdiff_t q_panel = ptrdiff_t(s.latent) * kPanelRows;
  const auto depth_from = [&](int first) { return s.latent - first < kScoreDepth ? s.latent - first : kScoreDepth; };
  Widening<Number>(task, 0, depth_from(0), 0, kTileRows).finish();
  for (int first = 0; first < s.latent; first += kScoreDepth) {
    const int depth = depth_from(first), next = first + depth;
    for (int panel = 0; panel < kPanels; panel += kTilePanels) {
      Product<float> p = {};
      p.b = task.q + panel * q_panel + ptrdiff_t(first) * kPanelRows;
      p.b_step = kPanelRows;
      p.b_panel = q_panel;
      p.depth = depth;
      p.out_row = kPanelRows;
      p.out_panel = kBlockKeys * kPanelRows;
      for (int key = 0; key < task.keys; key += kTileRows) {  // a last tile may compute scores that nobody reads
        p.a = task.wide + ptrdiff_t(key) * s.latent_stride + first;
        p.out = scores + (ptrdiff_t(panel) * kBlockKeys + key) * kPanelRows;
        const bool same = key + kTileRows < task.keys;  // the next tile is one of this panel
        const int next_key = same ? key + kTileRows : 0;
        const bool widen = same ? panel == 0 : panel + kTilePanels == kPanels && next < s.latent;
        Widening<Number> beside(task, same ? first : next, same ? depth : depth_from(next), next_key,
                                widen ? next_key + kTileRows : 0);
        if (first == 0) {
          multiply_tile<kTileRows, kTilePanels, kZero>(p, s.latent_stride, 1, nullptr, beside);
        } else {
          multiply_tile<kTileRows, kTilePanels, kAdd>(p, s.latent_stride, 1, nullptr, beside);
        }
        beside.finish();
      }
    }
  }
}

void hide_later_keys(const AttendTask& task, float* scores) {
  for (int row = 0; row < kGroupRows; ++row) {
    float* lane = scores + ptrdiff_t(row / kPanelRows) * kBlockKeys * kPanelRows + row % kPanelRows;
    for (int key = task.visible[row]; key < task.keys; ++key) lane[key * kPanelRows] = -__builtin_inff();
  }
}

// Turns a panel's scores into weights relative to the highest score so far; `shrink`: what earlier sums are worth now.
void soften(const AttendTask& task, int panel, float* scores, float* shrink) {
  float* peak = task.partial.peak + panel * kPanelRows;
  float* total = task.partial.total + panel * kPanelRows;
  scores += ptrdiff_t(panel) * kBlockKeys * kPanelRows;
  const F32x16 before = task.first ? f32(kLowest) : load_f32(peak);
  F32x16 highest = before;
  for (int key = 0; key < task.keys; ++key) highest = max_f32(load_f32(scores + key * kPanelRows), highest);
  const F32x16 factor = exp_to_zero(sub(before, highest));
  F32x16 sum = task.first ? f32(0.0f) : mul(load_f32(total), factor);
  for (int key = 0; key < task.keys; ++key) {
    float* score = scores + key * kPanelRows;
    const F32x16 weight = exp_to_zero(sub(load_f32(score), highest));
    store_f32(weight, score);
    sum = add(sum, weight);
  }
  store_f32(highest, peak);
  store_f32(sum, total);
  store_f32(factor, shrink + panel * kPanelRows);
}

// Asks for one line of a latent of the next block at each step of a tile.
struct FetchLine {
  FetchLine(const LatentFetch& fetch, int tile)
      : latents(fetch.latents), keys(tile < fetch.lines ? fetch.keys : 0), offset(64 * ptrdiff_t(fetch.line + tile)) {}

  K2_INLINE void operator()(int k) const {
    if (k < keys) prefetch(static_cast<const char*>(latents[k]) + offset);
  }

  const void* const* latents;
  int keys;
  ptrdiff_t offset;
};

// context[panel][c][16] = shrink * context + sum over keys of weights * latents
void add_latents(const AttendTask& task, const float* weights, const float* shrink) {
  const MlaSizes& s = *task.sizes;
  const ptrdiff_t context_panel = ptrdiff_t(s.context_rows) * kPanelRows;
  for (int panel = 0; panel < kPanels; panel += kTilePanels) {
    Product<float> p = {};
    p.b = weights + ptrdiff_t(panel) * kBlockKeys * kPanelRows;
    p.b_step = kPanelRows;
    p.b_panel = kBlockKeys * kPanelRows;
    p.depth = task.keys;
    p.out_row = kPanelRows;
    p.out_panel = context_panel;
    for (int c = 0; c < s.context_rows; c += kTileRows) {
      p.a = task.wide + c;
      const FetchLine fetch(task.fetch, (panel / kTilePanels * s.context_rows + c) / kTileRows);
      p.out = task.partial.context + panel * context_panel + ptrdiff_t(c) * kPanelRows;
      if (task.first) {
        multiply_tile<kTileRows, kTilePanels, kZero>(p, 1, s.latent_stride, nullptr, fetch);
      } else {
        multiply_tile<kTileRows, kTilePanels, kShrink>(p, 1, s.latent_stride, shrink + panel * kPanelRows, fetch);
      }
    }
  }
}

void attend(const AttendTask& task) {
  float* scores = task.scratch;
  float* shrink = scores + kPanels * kBlockKeys * kPanelRows;
  task.bf16 ? score<uint16_t>(task, scores) : score<float>(task, scores);
  if (task.visible) hide_later_keys(task, scores);
  for (int panel = 0; panel < kPanels; ++panel) soften(task, panel, scores, shrink);
  add_latents(task, scores, shrink);
}

// ---- merge ----

void merge(const MergeTask& task) {
  const MlaSizes& s = *task.sizes;
  const int lane = task.panel * kPanelRows;
  F32x16 highest = f32(kLowest);
  for (int r = 0; r < task.ranges; ++r) highest = max_f32(load_f32(task.partials[r].peak + lane), highest);
  F32x16 total = f32(0.0f);
  for (int r = 0; r < task.ranges; ++r) {
    const Partial& partial = task.partials[r];
    total = fma(load_f32(partial.total + lane), exp_to_zero(sub(load_f32(partial.peak + lane), highest)), total);
  }
  const int end = task.first_column + task.columns;
  const int last = end < s.context_width ? end : s.context_width;
  for (int column = task.first_column; column < last; column += 16) {
    const int columns = s.kv_lora - column < 16 ? s.kv_lora - column : 16;
    F32x16 sums[16];
    for (int c = 0; c < 16; ++c) sums[c] = f32(0.0f);
    for (int r = 0; r < task.ranges; ++r) {
      const Partial& partial = task.partials[r];
      const F32x16 weight = exp_to_zero(sub(load_f32(partial.peak + lane), highest));
      const float* context = partial.context + (ptrdiff_t(task.panel) * s.context_rows + column) * kPanelRows;
      for (int c = 0; c < columns; ++c) sums[c] = fma(weight, load_f32(context + c * kPanelRows), sums[c]);
    }
    float square[16][kPanelRows];
    for (int c = 0; c < columns; ++c) store_f32(div(sums[c], total), square[c]);
    for (int c = columns; c < 16; ++c) store_f32(f32(0.0f), square[c]);
    for (int row = 0; row < kPanelRows; ++row) {
      if (!task.out[row]) continue;
      for (int c = 0; c < 16; ++c) task.out[row][column + c] = square[c][row];
    }
  }
}

// ---- expand ----

// The one sum across lanes: halves are added to halves.
K2_INLINE float sum_lanes(F32x16 x) {
  float v[16];
  store_f32(x, v);
  for (int i = 0; i < 8; ++i) v[i] += v[i + 8];
  for (int i = 0; i < 4; ++i) v[i] += v[i + 4];
  for (int i = 0; i < 2; ++i) v[i] += v[i + 2];
  return v[0] + v[1];
}

constexpr int kExpandAhead = 8;  // rows

// V rows of W_UV from `first` on, for T tokens.
template <int V, int T, class Number>
K2_INLINE void expand_tile(const ExpandTask& task, const Number* w, int first, int token) {
  const int kv_lora = task.sizes->kv_lora;
  w += ptrdiff_t(first) * kv_lora;
  const ptrdiff_t ahead = rows_ahead(w, task.sizes->value - first, kExpandAhead, kv_lora, task.next);
  constexpr int kLine = 64 / sizeof(Number);
  F32x16 sums[V][T];
  for (int v = 0; v < V; ++v) {
    for (int t = 0; t < T; ++t) sums[v][t] = f32(0.0f);
  }
  int c = 0;
  for (; c + 16 <= kv_lora; c += 16) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Number* at = w + ptrdiff_t(v) * kv_lora + c;
      const F32x16 x = load(at);
      if (ahead && c % kLine == 0) prefetch(at + ahead);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[v][t] = fma(x, load_f32(task.context[token + t] + c), sums[v][t]);
    }
  }
  if (c < kv_lora) {
    for (int v = 0; v < V; ++v) {
      const F32x16 x = load_part(w + ptrdiff_t(v) * kv_lora + c, kv_lora - c);
      for (int t = 0; t < T; ++t) sums[v][t] = fma(x, load_f32(task.context[token + t] + c), sums[v][t]);
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int t = 0; t < T; ++t) task.out[token + t][first + v] = sum_lanes(sums[v][t]);
  }
}

template <int V, int T, class Number>
K2_INLINE void expand_column(const ExpandTask& task, const Number* w, int token) {
  int v = 0;
  for (; v + V <= task.sizes->value; v += V) expand_tile<V, T>(task, w, v, token);
  for (; v < task.sizes->value; ++v) expand_tile<1, T>(task, w, v, token);
}

template <class Number>
void expand_as(const ExpandTask& task) {
  const Number* w = static_cast<const Number*>(task.w_uv);
  int token = 0;
  for (; token + kExpandTokens <= task.tokens; token += kExpandTokens) expand_column<2, kExpandTokens>(task, w, token);
  for (; token + 3 <= task.tokens; token += 3) expand_column<2, 3>(task, w, token);
  for (; token < task.tokens; ++token) expand_column<4, 1>(task, w, token);
}

void expand(const ExpandTask& task) { task.bf16 ? expand_as<uint16_t>(task) : expand_as<float>(task); }

// ---- peak ----

constexpr int64_t kPeakOperations = int64_t(2) * kTileRows * kTilePanels * kPanelRows;

uint64_t peak(int64_t rounds) {
  // All lanes differ: equal halves of a vector would be computed once.
  float lanes[kPanelRows];
  for (int i = 0; i < kPanelRows; ++i) lanes[i] = float((rounds + i) % 17);
  const F32x16 x = load_f32(lanes), y = f32(0.5f);
  F32x16 sums[kTileRows * kTilePanels];
#pragma GCC unroll 24
  for (int i = 0; i < kTileRows * kTilePanels; ++i) sums[i] = mul(x, f32(float(i)));
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kTileRows * kTilePanels; ++i) sums[i] = fma(sums[i], y, x);
  }
  float all = 0;
  for (int i = 0; i < kTileRows * kTilePanels; ++i) all += sum_lanes(sums[i]);
  return uint64_t(all);
}
