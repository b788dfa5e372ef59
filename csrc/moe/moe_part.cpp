#include "moe/moe_part.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace k2 {
namespace {

constexpr int64_t kCacheLine = 64;

// Two workers never write to one line.
int64_t whole_lines(int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

int64_t packed_row_bytes(const KernelTable& table, int groups) { return whole_lines(int64_t(table.group_bytes) * groups); }

}  // namespace

MoePart::MoePart(const KernelTable& table, const Tuning& tuning, const ExpertLayer& layer, int node, int workers,
                 const std::vector<RoutedChunk>& chunks, HiddenRows hidden, PartMemory& memory, float* output)
    : table_(table),
      tuning_(tuning),
      layer_(layer),
      node_(node),
      pairs_(layer.channels(node).count),
      chunks_(chunks),
      hidden_(hidden),
      memory_(memory),
      output_(output),
      packed_bytes_(packed_row_bytes(table, layer.shape().hidden_groups())),
      activated_bytes_(packed_row_bytes(table, pairs_)),
      scratch_bytes_(whole_lines(int64_t(scratch_bytes(table, std::max(layer.shape().hidden_groups(), pairs_))))) {
  size_t tokens = 0, most_tokens = 0, most_rows = 0;
  for (const RoutedChunk& chunk : chunks) {
    tokens += size_t(chunk.tokens);
    most_tokens = std::max(most_tokens, size_t(chunk.tokens));
    most_rows = std::max(most_rows, chunk.rows.size());
    ChunkState state;
    state.units_done.reset(new std::atomic<int>[chunk.experts.size()]());
    state.row_bad.reset(new std::atomic<bool>[chunk.rows.size()]());
    state.token_bad.reset(new std::atomic<bool>[chunk.tokens]());
    states_.push_back(std::move(state));
  }
  if (!output_) {
    reserve(memory.output, tokens * size_t(layer.shape().hidden) * sizeof(float));
    output_ = reinterpret_cast<float*>(memory.output.data());
  }
  reserve(memory.packed, most_tokens * size_t(packed_bytes_));
  reserve(memory.activated, most_rows * size_t(activated_bytes_));
  reserve(memory.scratch, size_t(workers) * size_t(scratch_bytes_));
}

void MoePart::run(Team& team, int worker) {
  const Share share{team.rank(worker), team.node_workers(node_)};
  int round = 0;
  for (size_t i = 0; i < chunks_.size(); ++i) {
    const RoutedChunk& chunk = chunks_[i];
    pack(chunk, states_[i], share);
    team.sync(arrived_, share.of, ++round);
    gate_up(chunk, states_[i], team, share);
    down(chunk, states_[i], team, share);
    // The next chunk packs over what `gate_up` and `down` read.
    if (i + 1 < chunks_.size()) team.sync(arrived_, share.of, ++round);
  }
}

void MoePart::pack(const RoutedChunk& chunk, ChunkState& state, Share share) {
  const LayerShape& shape = layer_.shape();
  for (int t = share.begin(chunk.tokens); t < share.end(chunk.tokens); ++t) {
    const int64_t at = int64_t(chunk.first_token + t) * shape.hidden;
    const bool fits = hidden_.bf16 ? table_.pack_bf16(reinterpret_cast<const uint16_t*>(hidden_.data) + at,
                                                      shape.hidden_groups(), packed(t))
                                   : table_.pack_fp32(reinterpret_cast<const float*>(hidden_.data) + at,
                                                      shape.hidden_groups(), packed(t));
    if (!fits) state.token_bad[t].store(true);
  }
}

void MoePart::gate_up(const RoutedChunk& chunk, ChunkState& state, Team& team, Share share) {
  const WorkCut begin = cut_work(chunk, pairs_, tuning_.token_cost, share.rank, share.of);
  const WorkCut end = cut_work(chunk, pairs_, tuning_.token_cost, share.rank + 1, share.of);
  for (int i = begin.index; i < int(chunk.experts.size()) && i <= end.index; ++i) {
    const int first = i == begin.index ? begin.unit : 0;
    const int last = i == end.index ? end.unit : pairs_;
    if (first >= last) continue;
    gate_up_expert(chunk, state, chunk.experts[i], first, last, team, share.rank);
    if (state.units_done[i].fetch_add(last - first) + last - first == pairs_) team.notify();
  }
}

void MoePart::gate_up_expert(const RoutedChunk& chunk, ChunkState& state, const ActiveExpert& expert, int first_pair,
                             int last_pair, const Team& team, int rank) {
  const LayerShape& shape = layer_.shape();
  const int64_t pair_bytes = 2 * int64_t(shape.hidden_groups()) * kBlockBytes;
  const uint8_t* input[kMaxTokens];
  uint8_t* output[kMaxTokens];
  for (int first = 0; first < expert.rows; first += table_.max_tokens) {
    team.check_cancelled();
    const int tokens = std::min(table_.max_tokens, expert.rows - first);
    for (int t = 0; t < tokens; ++t) {
      const int row = expert.first_row + first + t;
      input[t] = packed(chunk.rows[row].token);
      output[t] = activated(row) + int64_t(first_pair) * table_.group_bytes;
    }
    uint64_t bad = table_.gate_up({
        .weights = layer_.w13(expert.expert, node_) + first_pair * pair_bytes,
        .groups = shape.hidden_groups(),
        .pairs = last_pair - first_pair,
        .tokens = tokens,
        .input = input,
        .output = output,
        .policy = tuning_.policy,
        .scratch = scratch(rank),
    });
    for (; bad != 0; bad &= bad - 1) state.row_bad[expert.first_row + first + std::countr_zero(bad)].store(true);
  }
}

void MoePart::down(const RoutedChunk& chunk, const ChunkState& state, Team& team, Share share) {
  const int blocks = layer_.shape().hidden_groups();
  const int first = share.begin(blocks), last = share.end(blocks);
  if (first == last) return;
  for (int t = 0; t < chunk.tokens; ++t) {
    std::fill_n(output_row(chunk.first_token + t) + first * kRowBlock, (last - first) * kRowBlock, 0.0f);
  }
  if (pairs_ == 0) return;  // more nodes than groups of channels
  for (size_t i = 0; i < chunk.experts.size(); ++i) {
    team.wait([&] { return state.units_done[i].load() == pairs_; });
    down_expert(chunk, state, chunk.experts[i], first, last, team, share.rank);
  }
}

void MoePart::down_expert(const RoutedChunk& chunk, const ChunkState& state, const ActiveExpert& expert,
                          int first_block, int last_block, const Team& team, int rank) {
  const int64_t stride = int64_t(pairs_) * kBlockBytes;
  const uint8_t* input[kMaxTokens];
  float factor[kMaxTokens];
  float* output[kMaxTokens];
  for (int first = 0; first < expert.rows; first += table_.max_tokens) {
    team.check_cancelled();
    const int tokens = std::min(table_.max_tokens, expert.rows - first);
    for (int t = 0; t < tokens; ++t) {
      const int row = expert.first_row + first + t;
      const RoutedRow& routed = chunk.rows[row];
      const bool bad = state.row_bad[row].load() || state.token_bad[routed.token].load();
      input[t] = activated(row);
      factor[t] = bad ? std::numeric_limits<float>::quiet_NaN() : routed.weight;
      output[t] = output_row(chunk.first_token + routed.token) + first_block * kRowBlock;
    }
    table_.down({
        .weights = layer_.w2(expert.expert, node_) + first_block * stride,
        .groups = pairs_,
        .blocks = last_block - first_block,
        .tokens = tokens,
        .stride_bytes = stride,
        .input = input,
        .factor = factor,
        .output = output,
        .policy = tuning_.policy,
        .scratch = scratch(rank),
    });
  }
}

}  // namespace k2
