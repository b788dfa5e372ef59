// The product that attention is made of, one text for all instruction sets; included by attention-inl.h. No include guard:
// it has no meaning outside the anonymous namespace of a kernel file.

K2_INLINE F32x16 load(const float* x) { return load_f32(x); }
K2_INLINE F32x16 load(const uint16_t* x) { return load_bf16(x); }

// The first n of 16 numbers, then zeros; reads no further.
template <class Number>
K2_INLINE F32x16 load_part(const Number* x, int n) {
  Number part[16] = {};
  for (int i = 0; i < n; ++i) part[i] = x[i];
  return load(part);
}

// Into the L2 cache, however far it is from what is read now.
K2_INLINE void prefetch(const void* x) { __builtin_prefetch(x, 0, 2); }

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
