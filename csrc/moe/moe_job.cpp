#include "moe/moe_job.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"

namespace k2 {

MoeJob::MoeJob(ThreadPool& pool, const KernelTable& table, const Tuning& tuning, const ExpertLayer& layer,
               WorkspaceStore& store, const MoeInput& input, float* output)
    : Job(pool), pool_(pool), layer_(layer), store_(store), tokens_(input.tokens) {
  check_argument(layer.nodes() == pool.map().nodes(), "nodes", text(pool.map().nodes()), layer.nodes());
  check_ids(input);
  const LayerShape& shape = layer.shape();
  for (int first = 0; first < tokens_; first += table.chunk_tokens) {
    const int64_t at = int64_t(first) * shape.experts_per_token;
    const int count = std::min(table.chunk_tokens, tokens_ - first);
    chunks_.push_back(
        route(input.ids + at, input.weights + at, first, count, shape.experts_per_token, shape.experts));
  }
  workspace_ = store_.take(layer.nodes());
  const HiddenRows hidden{output ? static_cast<const uint8_t*>(input.hidden) : copy_hidden(input), input.bf16};
  for (int node = 0; node < layer.nodes(); ++node) {
    parts_.push_back(std::make_unique<MoePart>(table, tuning, layer, node, pool.map().workers(node), chunks_, hidden,
                                               workspace_->parts[node], node == 0 ? output : nullptr));
  }
}

const uint8_t* MoeJob::copy_hidden(const MoeInput& input) {
  const size_t bytes = size_t(tokens_) * layer_.shape().hidden * (input.bf16 ? 2 : 4);
  reserve(workspace_->hidden, bytes);
  if (bytes > 0) std::memcpy(workspace_->hidden.data(), input.hidden, bytes);
  return workspace_->hidden.data();
}

MoeJob::~MoeJob() {
  parts_.clear();  // they refer to the workspace
  if (workspace_ && !pool_.forked()) store_.give(std::move(workspace_));
}

void MoeJob::copy_output(float* out) const {
  const size_t bytes = size_t(tokens_) * layer_.shape().hidden * sizeof(float);
  if (bytes > 0) std::memcpy(out, parts_[0]->output_row(0), bytes);
}

void MoeJob::check_ids(const MoeInput& input) const {
  const LayerShape& shape = layer_.shape();
  for (int64_t i = 0; i < int64_t(input.tokens) * shape.experts_per_token; ++i) {
    const int expert = input.ids[i];
    if (expert == kElsewhere) continue;
    if (expert < 0 || expert >= shape.experts) {  // the text is made for errors only
      check_argument(false, "ids", text("experts 0..", shape.experts - 1), expert);
    }
    if (!layer_.loaded(expert)) {
      throw EngineError(text("expert ", expert, ": expected it to be loaded, got a request for it before"));
    }
  }
}

void MoeJob::run(Team& team, int worker) {
  parts_[team.node(worker)]->run(team, worker);
  if (parts_.size() == 1) return;
  team.sync(1);
  add_partial_sums({worker, team.workers()});
}

void MoeJob::add_partial_sums(Share share) {
  const int64_t blocks = int64_t(tokens_) * layer_.shape().hidden_groups();
  const int64_t first = share.begin(blocks) * kRowBlock, last = share.end(blocks) * kRowBlock;
  float* sum = parts_[0]->output_row(0);
  for (size_t node = 1; node < parts_.size(); ++node) {
    const float* partial = parts_[node]->output_row(0);
    for (int64_t i = first; i < last; ++i) sum[i] += partial[i];
  }
}

}  // namespace k2
