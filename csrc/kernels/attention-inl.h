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
#include "kernels/attention_tile-inl.h"
#include "kernels/attention_heads-inl.h"

// Of the queries' panels, so that a tile's 12 to 24 KB stay in the L1 cache while it meets the keys of a block.
constexpr int kScoreDepth = 192;

constexpr float kLowest = -3.40282347e38f;  // below every score, and finite: a difference with it is never NaN

// exp(x) for x <= 0 and NaN; exactly 0 below -87.7. Relative error below 2^-22 where the result is a normal number.
K2_INLINE F32x16 exp_to_zero(F32x16 x) {
  const Exponential e = exponential(max_f32(f32(-104.0f), x));  // the second operand where x is NaN
  return mul(e.mantissa, power_of_two(max_i32(e.exponent, i32(-127))));
}

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
