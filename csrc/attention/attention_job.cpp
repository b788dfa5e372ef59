#include "attention/attention_job.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/error.h"

namespace k2 {
namespace {

constexpr int kMergeColumns = 128;  // of one unit: several workers share a group

int64_t units_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

size_t scratch_numbers(const MlaSizes& s) {
  const size_t attend = size_t(kBlockKeys) * (s.latent_stride + kGroupRows) + kGroupRows;
  const size_t absorb = size_t(kHeadTokens) * s.context_width;
  return size_t(units_of(int64_t(std::max(attend, absorb)), 16) * 16);
}

void reserve_numbers(HugeBuffer& buffer, size_t numbers) {
  reserve(buffer, numbers * sizeof(float));
}

float* numbers(const HugeBuffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

}  // namespace

AttentionJob::AttentionJob(ThreadPool& pool, const AttentionTable& table, const MlaSizes& sizes, float scale,
                           AttentionInput input, AttentionWorkspace& workspace)
    : Job(pool),
      table_(table),
      sizes_(sizes),
      scale_(scale),
      input_(std::move(input)),
      workspace_(workspace) {
  for (const AttentionSequence& sequence : input_.sequences) input_.pages.check(sequence, input_.tokens);
  plan_ = plan_attention(sizes_, input_.sequences);
  plan_queues(pool.workers());
  reserve_numbers(workspace_.queries, plan_.max_groups * kGroupRows * sizes_.latent);
  reserve_numbers(workspace_.contexts, plan_.max_tokens * sizes_.heads * sizes_.context_width);
  reserve_numbers(workspace_.partials, plan_.max_partials * partial_numbers(sizes_));
  reserve_numbers(workspace_.scratch, size_t(pool.workers()) * scratch_numbers(sizes_));
}

void AttentionJob::plan_queues(int workers) {
  using Deal = UnitQueue::Deal;
  for (const Slab& slab : plan_.slabs) {
    queues_.emplace_back(Deal::kRuns, head_units(slab), workers);
    for (const Wave& wave : slab.waves) {
      queues_.emplace_back(Deal::kRoundRobin, int64_t(wave.units.size()), workers);  // large ones first
      queues_.emplace_back(Deal::kRuns, merge_units(wave), workers);
    }
    queues_.emplace_back(Deal::kRuns, head_units(slab), workers);
  }
}

void AttentionJob::run(Team& team, int worker) {
  float* scratch = numbers(workspace_.scratch) + worker * scratch_numbers(sizes_);
  std::vector<Partial> partials;  // of a group, in `merge`
  int phase = 0, round = 0;
  for (const Slab& slab : plan_.slabs) {
    take_units(team, phase++, worker, [&](const UnitQueue::Unit& unit) { absorb(slab, unit, scratch); });
    team.sync(++round);
    for (const Wave& wave : slab.waves) {
      take_units(team, phase++, worker, [&](const UnitQueue::Unit& unit) { attend(slab, wave, unit, scratch); });
      team.sync(++round);
      take_units(team, phase++, worker, [&](const UnitQueue::Unit& unit) { merge(slab, wave, unit.unit, partials); });
      team.sync(++round);  // the next wave writes over the partials, and `expand` reads the contexts
    }
    take_units(team, phase++, worker, [&](const UnitQueue::Unit& unit) { expand(slab, unit); });
  }
}

template <class Work>
void AttentionJob::take_units(Team& team, int phase, int worker, Work work) {
  UnitQueue& queue = queues_[size_t(phase)];
  for (UnitQueue::Unit unit = queue.take(worker); unit.unit >= 0; unit = queue.take(worker)) {
    team.check_cancelled();
    work(unit);
  }
}

// One head and at most kHeadTokens tokens each; the units of a head follow each other, so that its weights are cached.
int64_t AttentionJob::head_units(const Slab& slab) const {
  return sizes_.heads * units_of(int64_t(slab.tokens.size()), kHeadTokens);
}

AttentionJob::HeadPart AttentionJob::head_part(const Slab& slab, int64_t unit) const {
  const int64_t tokens = int64_t(slab.tokens.size()), tiles = units_of(tokens, kHeadTokens);
  const int64_t first = unit % tiles * kHeadTokens;
  return {unit / tiles, first, int(std::min<int64_t>(kHeadTokens, tokens - first))};
}

void AttentionJob::absorb(const Slab& slab, const UnitQueue::Unit& unit, float* scratch) const {
  const HeadPart part = head_part(slab, unit.unit);
  const float* q[kHeadTokens];
  float* out[kHeadTokens];
  for (int t = 0; t < part.tokens; ++t) {
    const SlabToken& token = slab.tokens[size_t(part.first_token + t)];
    q[t] = input_.q + (token.row * sizes_.heads + part.head) * (sizes_.nope + sizes_.rope);
    out[t] = query_lane(token.first_lane + part.head);
  }
  table_.absorb({.sizes = &sizes_,
                 .w_uk = weights(part.head, 0),
                 .next = unit.next < 0 ? nullptr : weights(head_part(slab, unit.next).head, 0),
                 .bf16 = input_.kv_b_bf16,
                 .scale = scale_,
                 .tokens = part.tokens,
                 .q = q,
                 .out = out,
                 .scratch = scratch});
}

void AttentionJob::attend(const Slab& slab, const Wave& wave, const UnitQueue::Unit& taken, float* scratch) const {
  const Unit& unit = wave.units[size_t(taken.unit)];
  const Group& group = slab.groups[size_t(unit.group)];
  const AttentionSequence& sequence = input_.sequences[size_t(group.sequence)];
  const int64_t begin = plan_.range_starts[size_t(unit.range)];
  const int64_t end = std::min(plan_.range_starts[size_t(unit.range) + 1], group.keys);
  const int64_t seen_by_all = sequence.cached + group.first_row / sizes_.heads + 1;
  for (int64_t first = begin; first < end; first += kBlockKeys) {
    const int keys = int(std::min<int64_t>(kBlockKeys, end - first));
    const void* latents[kBlockKeys];
    for (int key = 0; key < keys; ++key) latents[key] = latent(sequence, first + key);
    int visible[kGroupRows];
    for (int row = 0; row < kGroupRows; ++row) {
      const int64_t position = sequence.cached + (group.first_row + row) / sizes_.heads;
      visible[row] = int(std::clamp<int64_t>(position + 1 - first, 0, keys));
    }
    table_.attend({.sizes = &sizes_,
                   .latents = latents,
                   .bf16 = input_.pages.bf16,
                   .keys = keys,
                   .q = query_lane(int64_t(unit.group) * kGroupRows),
                   .visible = first + keys <= seen_by_all ? nullptr : visible,
                   .first = first == begin,
                   .partial = partial(group.first_partial + unit.range),
                   .scratch = scratch});
  }
}

int64_t AttentionJob::merge_units(const Wave& wave) const {
  return (wave.last_group - wave.first_group) * kPanels * units_of(sizes_.context_width, kMergeColumns);
}

void AttentionJob::merge(const Slab& slab, const Wave& wave, int64_t unit, std::vector<Partial>& partials) const {
  const int64_t slices = units_of(sizes_.context_width, kMergeColumns);
  const int panel = int(unit / slices % kPanels);
  const Group& group = slab.groups[size_t(wave.first_group + unit / slices / kPanels)];
  if (panel * kPanelRows >= group.rows) return;
  float* out[kPanelRows];
  for (int lane = 0; lane < kPanelRows; ++lane) {
    const int row = panel * kPanelRows + lane;
    out[lane] = row < group.rows ? context(group.context_row + row) : nullptr;
  }
  partials.clear();
  for (int range = 0; range < group.ranges; ++range) partials.push_back(partial(group.first_partial + range));
  table_.merge({.sizes = &sizes_,
                .partials = partials.data(),
                .ranges = group.ranges,
                .panel = panel,
                .first_column = int(unit % slices) * kMergeColumns,
                .columns = kMergeColumns,
                .out = out});
}

void AttentionJob::expand(const Slab& slab, const UnitQueue::Unit& unit) const {
  const HeadPart part = head_part(slab, unit.unit);
  const float* contexts[kHeadTokens];
  float* out[kHeadTokens];
  for (int t = 0; t < part.tokens; ++t) {
    const int64_t token = part.first_token + t;
    contexts[t] = context(token * sizes_.heads + part.head);
    out[t] = input_.out + (slab.tokens[size_t(token)].row * sizes_.heads + part.head) * sizes_.value;
  }
  table_.expand({.sizes = &sizes_,
                 .w_uv = weights(part.head, sizes_.nope),
                 .next = unit.next < 0 ? nullptr : weights(head_part(slab, unit.next).head, sizes_.nope),
                 .bf16 = input_.kv_b_bf16,
                 .tokens = part.tokens,
                 .context = contexts,
                 .out = out});
}

const uint8_t* AttentionJob::weights(int64_t head, int64_t row) const {
  const int64_t at = (head * (sizes_.nope + sizes_.value) + row) * sizes_.kv_lora;
  return static_cast<const uint8_t*>(input_.kv_b) + at * (input_.kv_b_bf16 ? 2 : 4);
}

const void* AttentionJob::latent(const AttentionSequence& sequence, int64_t key) const {
  const LatentPages& pages = input_.pages;
  const int64_t at = pages.slot(sequence, key) * sizes_.latent;
  return static_cast<const uint8_t*>(pages.data) + at * (pages.bf16 ? 2 : 4);
}

float* AttentionJob::query_lane(int64_t lane) const {
  return numbers(workspace_.queries) + lane / kPanelRows * kPanelRows * sizes_.latent + lane % kPanelRows;
}

float* AttentionJob::context(int64_t row) const { return numbers(workspace_.contexts) + row * sizes_.context_width; }

Partial AttentionJob::partial(int64_t index) const {
  float* peak = numbers(workspace_.partials) + index * int64_t(partial_numbers(sizes_));
  return {peak, peak + kGroupRows, peak + 2 * kGroupRows};
}

}  // namespace k2
