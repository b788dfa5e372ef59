// Attention's products with weights, head by head: W_UK moves to the queries, W_UV turns contexts into values. Included by
// attention-inl.h. No include guard: it has no meaning outside the anonymous namespace of a kernel file.

// W_UK is read in the order it lies in memory, so many rows at a time; the sums of a row stay in the L1 cache between.
constexpr int kAbsorbDepth = 16;

// Tokens of a tile of `absorb` and of `expand`, for as long as there are so many.
constexpr int kAbsorbTokens = 4 * kTilePanels;
constexpr int kExpandTokens = kTilePanels == 1 ? 3 : 8;

// How far on what is read `rows` rows after `x` lies, in numbers. The matrix has `left` rows from `x` on, then comes the
// `next` one; 0 if there is none.
template <class Number>
K2_INLINE ptrdiff_t rows_ahead(const Number* x, int left, int rows, ptrdiff_t width, const void* next) {
  if (left > rows) return rows * width;
  return next ? static_cast<const Number*>(next) - x + (rows - left) * width : 0;
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
