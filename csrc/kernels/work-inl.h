// The order of work of an expert on vectors of 16 lanes, one text for all instruction sets and numerics.
//
// Included inside the anonymous namespace of each kernel file, after
//   `lanes-inl.h`   the types F32x16 and I32x16 and their operations;
//   `tile-inl.h`    tile<T>(weights, groups, input[T], prefetch, sums)
//                     one row block times T tokens, T <= kMaxTile;
//                   tile_streams<S>(weights, distance, groups, input[T], prefetch, sums[S])
//                     S row blocks, `distance` apart: 1, 2 or 4 with one token, and 2 with two and three if kTwoStreams;
//                   overloaded for the forms of activations: Hidden, that of the input, and Middle, that of the
//                   intermediate. They add group after group by one fma each; sums carry the factor 2^kExponentBase;
//   `pack_group`    for the same forms.
// Every rounding happens in an operation named here or there, in this order, so all instruction sets give the same bits.
//
// No include guard: it has no meaning outside those namespaces.

#include "kernels/exp-inl.h"
#include "kernels/for_each_tile-inl.h"

// Six tiles of six: with 16 KB per token at 7168 inputs their activations stay in a 1 MB L2 cache (Zen 4: 198 GOPS at
// 256 tokens against 187 without the limit), and a row block's weights are read from memory once per call.
constexpr int kMaxTokensPerCall = 36;

// exp(x) for x clamped to [-87, 88], where 2^n and the result are normal numbers.
K2_INLINE F32x16 exp_f32(F32x16 x) {
  const Exponential e = exponential(min_f32(max_f32(x, f32(-87.0f)), f32(88.0f)));
  return mul(e.mantissa, power_of_two(e.exponent));
}

K2_INLINE F32x16 silu(F32x16 x) { return div(x, add(f32(1.0f), exp_f32(sub(f32(0.0f), x)))); }

K2_INLINE F32x16 load(const float* x) { return load_f32(x); }
K2_INLINE F32x16 load(const uint16_t* x) { return load_bf16(x); }

// False if a group has no packed form; the others are packed all the same.
template <class Group, class Real>
bool pack_rows(const Real* x, int groups, uint8_t* packed) {
  Group* group = reinterpret_cast<Group*>(packed);
  bool fits = true;
  for (int g = 0; g < groups; ++g, x += kGroup) fits &= pack_group(load(x), load(x + 16), group + g);
  return fits;
}

// Takes back the common factor of the exponents.
K2_INLINE F32x16 unscale(F32x16 x) { return mul(x, as_f32(i32((127 - kExponentBase) << 23))); }

// out[0..31] += factor * rows, one rounding each.
K2_INLINE void add_rows(F32x16 low, F32x16 high, float factor, float* out) {
  store_f32(fma(unscale(low), f32(factor), load_f32(out)), out);
  store_f32(fma(unscale(high), f32(factor), load_f32(out + kHalfBlock)), out + kHalfBlock);
}

// silu(gate) * up of one row block for T tokens: gate rows are its first half, up rows its second.
template <int T>
K2_INLINE void activate(const Tile<T>& sums, F32x16 (&h)[T]) {
  for (int t = 0; t < T; ++t) h[t] = mul(silu(unscale(sums.rows[0][t])), unscale(sums.rows[1][t]));
}

// The first tile over a row block brings it into the cache for the others.
K2_INLINE int prefetch_distance(const CallPolicy& policy, int tokens, int first_token) {
  if (first_token > 0) return 0;
  return tokens == 1 ? policy.prefetch_one : policy.prefetch_many;
}

// Hidden is the form of the input and Middle that of the intermediate: tile and tile_streams are overloaded for them.
template <class Hidden, class Middle, int T>
uint64_t gate_up_tile(const GateUpTask& task, int pair, int first_token) {
  const ptrdiff_t row_block = ptrdiff_t(task.groups) * kBlockBytes;
  const uint8_t* weights = task.weights + 2 * pair * row_block;
  const Hidden* input[T];
  for (int t = 0; t < T; ++t) input[t] = reinterpret_cast<const Hidden*>(task.input[first_token + t]);
  const int prefetch = prefetch_distance(task.policy, task.tokens, first_token);
  F32x16 h[2][T];
  for (int block = 0; block < 2; ++block) {
    Tile<T> sums;
    tile<T>(weights + block * row_block, task.groups, input, prefetch, sums);
    activate<T>(sums, h[block]);
  }
  uint64_t bad = 0;
  for (int t = 0; t < T; ++t) {
    Middle* group = reinterpret_cast<Middle*>(task.output[first_token + t]) + pair;
    bad |= uint64_t(!pack_group(h[0][t], h[1][t], group)) << (first_token + t);
  }
  return bad;
}

// Few tokens: S pairs at once, each a part of the slice away from the next, so that every stream runs through its part in
// order and the hardware prefetchers follow all of them. Two and three tokens gain by two streams, because one leaves
// memory idle while it multiplies (Emerald Rapids: 87 to 96 and 81 to 88 % of the raw read). Adjacent pairs gain nothing:
// what a stream prefetches past its end was just read.
template <class Hidden, class Middle, int S, int T>
uint64_t gate_up_streams(const GateUpTask& task) {
  const ptrdiff_t row_block = ptrdiff_t(task.groups) * kBlockBytes;
  const Hidden* input[T];
  for (int t = 0; t < T; ++t) input[t] = reinterpret_cast<const Hidden*>(task.input[t]);
  const int prefetch = prefetch_distance(task.policy, T, 0);
  const int part = task.pairs / S;
  uint64_t bad = 0;
  for (int i = 0; i < part; ++i) {
    F32x16 h[2][S][T];
    for (int block = 0; block < 2; ++block) {
      Tile<T> sums[S];
      tile_streams<S>(task.weights + (2 * i + block) * row_block, 2 * part * row_block, task.groups, input, prefetch, sums);
      for (int s = 0; s < S; ++s) activate<T>(sums[s], h[block][s]);
    }
    for (int t = 0; t < T; ++t) {
      Middle* output = reinterpret_cast<Middle*>(task.output[t]) + i;
      for (int s = 0; s < S; ++s) bad |= uint64_t(!pack_group(h[0][s][t], h[1][s][t], output + s * part)) << t;
    }
  }
  for (int pair = S * part; pair < task.pairs; ++pair) bad |= gate_up_tile<Hidden, Middle, T>(task, pair, 0);
  return bad;
}

template <class Middle, int T>
void down_tile(const DownTask& task, int block, int first_token) {
  const Middle* input[T];
  for (int t = 0; t < T; ++t) input[t] = reinterpret_cast<const Middle*>(task.input[first_token + t]);
  Tile<T> sums;
  tile<T>(task.weights + block * task.stride_bytes, task.groups, input,
          prefetch_distance(task.policy, task.tokens, first_token), sums);
  for (int t = 0; t < T; ++t) {
    add_rows(sums.rows[0][t], sums.rows[1][t], task.factor[first_token + t],
             task.output[first_token + t] + block * kRowBlock);
  }
}

template <class Middle, int S, int T>
void down_streams(const DownTask& task) {
  const Middle* input[T];
  for (int t = 0; t < T; ++t) input[t] = reinterpret_cast<const Middle*>(task.input[t]);
  const int prefetch = prefetch_distance(task.policy, T, 0);
  const int part = task.blocks / S;
  for (int i = 0; i < part; ++i) {
    Tile<T> sums[S];
    tile_streams<S>(task.weights + i * task.stride_bytes, part * task.stride_bytes, task.groups, input, prefetch, sums);
    for (int s = 0; s < S; ++s) {
      for (int t = 0; t < T; ++t) {
        add_rows(sums[s].rows[0][t], sums[s].rows[1][t], task.factor[t], task.output[t] + (s * part + i) * kRowBlock);
      }
    }
  }
  for (int block = S * part; block < task.blocks; ++block) down_tile<Middle, T>(task, block, 0);
}

template <class Hidden, class Middle>
uint64_t gate_up(const GateUpTask& task) {
  if (task.tokens == 1) {
    switch (task.policy.streams) {
      case 1: return gate_up_streams<Hidden, Middle, 1, 1>(task);
      case 2: return gate_up_streams<Hidden, Middle, 2, 1>(task);
      default: return gate_up_streams<Hidden, Middle, 4, 1>(task);
    }
  }
  if constexpr (kTwoStreams) {
    if (task.tokens == 2) return gate_up_streams<Hidden, Middle, 2, 2>(task);
    if (task.tokens == 3) return gate_up_streams<Hidden, Middle, 2, 3>(task);
  }
  uint64_t bad = 0;
  for (int pair = 0; pair < task.pairs; ++pair) {
    for_each_tile(task.tokens, kMaxTile, [&](int first, int size) {
      switch (size) {
        case 1: bad |= gate_up_tile<Hidden, Middle, 1>(task, pair, first); break;
        case 2: bad |= gate_up_tile<Hidden, Middle, 2>(task, pair, first); break;
        case 3: bad |= gate_up_tile<Hidden, Middle, 3>(task, pair, first); break;
        case 4: bad |= gate_up_tile<Hidden, Middle, 4>(task, pair, first); break;
        case 5: bad |= gate_up_tile<Hidden, Middle, 5>(task, pair, first); break;
        default: bad |= gate_up_tile<Hidden, Middle, kMaxTile>(task, pair, first);
      }
    });
  }
  return bad;
}

template <class Middle>
void down(const DownTask& task) {
  if (task.tokens == 1) {
    switch (task.policy.streams) {
      case 1: return down_streams<Middle, 1, 1>(task);
      case 2: return down_streams<Middle, 2, 1>(task);
      default: return down_streams<Middle, 4, 1>(task);
    }
  }
  if constexpr (kTwoStreams) {
    if (task.tokens == 2) return down_streams<Middle, 2, 2>(task);
    if (task.tokens == 3) return down_streams<Middle, 2, 3>(task);
  }
  for (int block = 0; block < task.blocks; ++block) {
    for_each_tile(task.tokens, kMaxTile, [&](int first, int size) {
      switch (size) {
        case 1: down_tile<Middle, 1>(task, block, first); break;
        case 2: down_tile<Middle, 2>(task, block, first); break;
        case 3: down_tile<Middle, 3>(task, block, first); break;
        case 4: down_tile<Middle, 4>(task, block, first); break;
        case 5: down_tile<Middle, 5>(task, block, first); break;
        default: down_tile<Middle, kMaxTile>(task, block, first);
      }
    });
  }
}
