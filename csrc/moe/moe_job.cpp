#include "moe/moe_job.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "core/error.h"

namespace k2 {
namespace {

// Tokens whose activations are in scratch at once: 1024 of the full size take 54 MB. The weights are read again for
// each chunk, which at 21 tokens per expert and chunk hides behind the multiplications.
constexpr int kChunkTokens = 1024;

constexpr int64_t kCacheLine = 64;

int64_t packed_row_bytes(const KernelTable& table, int groups) {
  const int64_t bytes = int64_t(table.group_bytes) * groups;
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;  // two workers never write to one line
}

// Worker `worker`'s share of `count` equal units begins here and ends where the next one's begins.
int share(int count, int worker, int workers) { return int(int64_t(count) * worker / workers); }

}  // namespace

MoeJob::MoeJob(ThreadPool& pool, const KernelTable& table, const ExpertLayer& layer, WorkspaceStore& store,
               const MoeInput& input)
    : Job(pool),
      table_(table),
      layer_(layer),
      store_(store),
      tokens_(input.tokens),
      bf16_(input.bf16),
      packed_bytes_(packed_row_bytes(table, layer.shape().hidden_groups())),
      activated_bytes_(packed_row_bytes(table, layer.shape().intermediate_groups())),
      token_bad_(new std::atomic<bool>[input.tokens]()) {
  check_ids(input);
  const LayerShape& shape = layer.shape();
  const int per_token = shape.experts_per_token;
  const int64_t chunk_tokens = std::min(tokens_, kChunkTokens);
  const size_t hidden_bytes = size_t(tokens_) * shape.hidden * (bf16_ ? 2 : 4);
  workspace_ = store_.take();
  reserve(workspace_->hidden, hidden_bytes);
  reserve(workspace_->output, size_t(tokens_) * shape.hidden * sizeof(float));
  reserve(workspace_->packed, size_t(chunk_tokens * packed_bytes_));
  reserve(workspace_->activated, size_t(chunk_tokens * per_token * activated_bytes_));
  if (tokens_ > 0) std::memcpy(workspace_->hidden.data(), input.hidden, hidden_bytes);
  for (int first = 0; first < tokens_; first += kChunkTokens) {
    const int64_t at = int64_t(first) * per_token;
    const int count = std::min(kChunkTokens, tokens_ - first);
    Chunk chunk{route(input.ids + at, input.weights + at, first, count, per_token, shape.experts), nullptr, nullptr};
    chunk.units_done.reset(new std::atomic<int>[chunk.routed.experts.size()]());
    chunk.row_bad.reset(new std::atomic<bool>[chunk.routed.rows.size()]());
    chunks_.push_back(std::move(chunk));
  }
}

MoeJob::~MoeJob() {
  if (workspace_) store_.give(std::move(workspace_));
}

void MoeJob::copy_output(float* out) const {
  const size_t bytes = size_t(tokens_) * layer_.shape().hidden * sizeof(float);
  if (bytes > 0) std::memcpy(out, workspace_->output.data(), bytes);
}

void MoeJob::check_ids(const MoeInput& input) const {
  const LayerShape& shape = layer_.shape();
  for (int64_t i = 0; i < int64_t(input.tokens) * shape.experts_per_token; ++i) {
    const int expert = input.ids[i];
    check_argument(expert >= 0 && expert < shape.experts, "ids", text("experts 0..", shape.experts - 1), expert);
    if (!layer_.loaded(expert)) {
      throw EngineError(text("expert ", expert, ": expected it to be loaded, got a request for it before"));
    }
  }
}

void MoeJob::run(Team& team, int worker) {
  int round = 0;
  for (Chunk& chunk : chunks_) {
    pack(chunk, team, worker);
    team.sync(++round);
    gate_up(chunk, team, worker);
    down(chunk, team, worker);
    if (&chunk != &chunks_.back()) team.sync(++round);  // the next chunk packs over what `gate_up` and `down` read
  }
}

void MoeJob::pack(const Chunk& chunk, const Team& team, int worker) {
  const LayerShape& shape = layer_.shape();
  const int last = share(chunk.routed.tokens, worker + 1, team.workers());
  for (int t = share(chunk.routed.tokens, worker, team.workers()); t < last; ++t) {
    const int token = chunk.routed.first_token + t;
    const int64_t at = int64_t(token) * shape.hidden;
    const uint8_t* hidden = workspace_->hidden.data();
    const bool fits =
        bf16_ ? table_.pack_bf16(reinterpret_cast<const uint16_t*>(hidden) + at, shape.hidden_groups(), packed(t))
              : table_.pack_fp32(reinterpret_cast<const float*>(hidden) + at, shape.hidden_groups(), packed(t));
    if (!fits) token_bad_[token].store(true);
  }
}

void MoeJob::gate_up(Chunk& chunk, Team& team, int worker) {
  const int pairs = layer_.shape().intermediate_groups();
  const WorkCut begin = cut_work(chunk.routed, pairs, worker, team.workers());
  const WorkCut end = cut_work(chunk.routed, pairs, worker + 1, team.workers());
  for (int i = begin.index; i < int(chunk.routed.experts.size()) && i <= end.index; ++i) {
    const int first = i == begin.index ? begin.unit : 0;
    const int last = i == end.index ? end.unit : pairs;
    if (first >= last) continue;
    gate_up_expert(chunk, chunk.routed.experts[i], first, last, team);
    if (chunk.units_done[i].fetch_add(last - first) + last - first == pairs) team.notify();
  }
}

void MoeJob::gate_up_expert(Chunk& chunk, const ActiveExpert& expert, int first_pair, int last_pair,
                            const Team& team) {
  const LayerShape& shape = layer_.shape();
  const uint8_t* input[kMaxTokens];
  uint8_t* output[kMaxTokens];
  for (int first = 0; first < expert.rows; first += table_.max_tokens) {
    team.check_cancelled();
    const int tokens = std::min(table_.max_tokens, expert.rows - first);
    for (int t = 0; t < tokens; ++t) {
      const int row = expert.first_row + first + t;
      input[t] = packed(chunk.routed.rows[row].token);
      output[t] = activated(row) + int64_t(first_pair) * table_.group_bytes;
    }
    const int64_t pair_bytes = 2 * int64_t(shape.hidden_groups()) * kBlockBytes;
    uint64_t bad = table_.gate_up({
        .weights = layer_.w13(expert.expert) + first_pair * pair_bytes,
        .groups = shape.hidden_groups(),
        .pairs = last_pair - first_pair,
        .tokens = tokens,
        .input = input,
        .output = output,
    });
    for (; bad != 0; bad &= bad - 1) chunk.row_bad[expert.first_row + first + std::countr_zero(bad)].store(true);
  }
}

void MoeJob::down(Chunk& chunk, Team& team, int worker) {
  const LayerShape& shape = layer_.shape();
  const int pairs = shape.intermediate_groups();
  const int first = share(shape.hidden_groups(), worker, team.workers());
  const int last = share(shape.hidden_groups(), worker + 1, team.workers());
  if (first == last) return;
  for (int t = 0; t < chunk.routed.tokens; ++t) {
    std::fill_n(output_row(chunk.routed.first_token + t) + first * kRowBlock, (last - first) * kRowBlock, 0.0f);
  }
  for (size_t i = 0; i < chunk.routed.experts.size(); ++i) {
    team.wait([&] { return chunk.units_done[i].load() == pairs; });
    down_expert(chunk, chunk.routed.experts[i], first, last, team);
  }
}

void MoeJob::down_expert(const Chunk& chunk, const ActiveExpert& expert, int first_block, int last_block,
                         const Team& team) {
  const LayerShape& shape = layer_.shape();
  const int64_t stride = int64_t(shape.intermediate_groups()) * kBlockBytes;
  const uint8_t* input[kMaxTokens];
  float factor[kMaxTokens];
  float* output[kMaxTokens];
  for (int first = 0; first < expert.rows; first += table_.max_tokens) {
    team.check_cancelled();
    const int tokens = std::min(table_.max_tokens, expert.rows - first);
    for (int t = 0; t < tokens; ++t) {
      const int row = expert.first_row + first + t;
      const RoutedRow& routed = chunk.routed.rows[row];
      const int token = chunk.routed.first_token + routed.token;
      const bool bad = chunk.row_bad[row].load() || token_bad_[token].load();
      input[t] = activated(row);
      factor[t] = bad ? std::numeric_limits<float>::quiet_NaN() : routed.weight;
      output[t] = output_row(token) + first_block * kRowBlock;
    }
    table_.down({
        .weights = layer_.w2(expert.expert) + first_block * stride,
        .groups = shape.intermediate_groups(),
        .blocks = last_block - first_block,
        .tokens = tokens,
        .stride_bytes = stride,
        .input = input,
        .factor = factor,
        .output = output,
    });
  }
}

}  // namespace k2
