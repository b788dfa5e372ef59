#include "attention/attention_job.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/error.h"

namespace k2 {
namespace {

constexpr int kMergeColumns = 128;  // of one unit: several workers share a group

// Units of the same range go together: they share the widened latents of a block, which take a twentieth of the time of
// attending to it, and a reading of the cache.
constexpr int kBatchUnits = 4;

// Work is taken in larger parts only where each worker has so many of them: the last ones end at about the same time.
constexpr int kPartsPerWorker = 8;

int64_t units_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

size_t scratch_numbers(const MlaSizes& s) {
  const size_t attend = kAttendNumbers + size_t(kBlockKeys) * s.latent_stride;
  const size_t absorb = size_t(kPartHeads) * kHeadTokens * (s.context_width + kPanelRows);
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
      workers_(pool.workers()),
      table_(table),
      sizes_(sizes),
      scale_(scale),
      input_(std::move(input)),
      workspace_(workspace) {
  for (const AttentionSequence& sequence : input_.sequences) input_.pages.check(sequence, input_.tokens);
  plan_ = plan_attention(sizes_, input_.sequences);
  plan_phases();
  reserve_numbers(workspace_.queries, plan_.max_groups * kGroupRows * sizes_.latent);
  reserve_numbers(workspace_.contexts, plan_.max_tokens * (sizes_.heads * sizes_.context_width + kPanelRows));
  reserve_numbers(workspace_.partials, plan_.max_partials * partial_numbers(sizes_));
  reserve_numbers(workspace_.scratch, size_t(workers_) * scratch_numbers(sizes_));
}

void AttentionJob::plan_phases() {
  using Deal = UnitQueue::Deal;
  for (const Slab& slab : plan_.slabs) {
    phases_.push_back({{Deal::kRuns, head_units(slab, absorb_heads(slab)), workers_}, {}});
    for (const Wave& wave : slab.waves) {
      std::vector<Batch> batches = make_batches(slab, wave);
      const int64_t count = int64_t(batches.size());
      phases_.push_back({{Deal::kRoundRobin, count, workers_}, std::move(batches)});  // large ones first
      phases_.push_back({{Deal::kRuns, merge_units(wave), workers_}, {}});
    }
    phases_.push_back({{Deal::kRuns, head_units(slab, 1), workers_}, {}});
  }
}

void AttentionJob::run(Team& team, int worker) {
  float* scratch = numbers(workspace_.scratch) + worker * scratch_numbers(sizes_);
  std::vector<Partial> partials;  // of a group, in `merge`
  using Taken = const UnitQueue::Unit&;
  auto phase = phases_.begin();
  int round = 0;
  for (const Slab& slab : plan_.slabs) {
    take_units(team, worker, *phase++, [&](Taken unit) { absorb(slab, unit, scratch); });
    team.sync(++round);
    for (const Wave& wave : slab.waves) {
      const std::vector<Batch>& batches = phase->batches;
      take_units(team, worker, *phase++, [&](Taken unit) { attend(slab, wave, batches, unit, scratch); });
      team.sync(++round);
      take_units(team, worker, *phase++, [&](Taken unit) { merge(slab, wave, unit.unit, partials); });
      team.sync(++round);  // the next wave writes over the partials, and `expand` reads the contexts
    }
    take_units(team, worker, *phase++, [&](Taken unit) { expand(slab, unit); });
  }
}

template <class Work>
void AttentionJob::take_units(Team& team, int worker, Phase& phase, Work work) {
  UnitQueue& queue = phase.queue;
  for (UnitQueue::Unit unit = queue.take(worker); unit.unit >= 0; unit = queue.take(worker)) {
    team.check_cancelled();
    work(unit);
  }
}

std::vector<AttentionJob::Batch> AttentionJob::make_batches(const Slab& slab, const Wave& wave) const {
  const int64_t units = int64_t(wave.units.size());
  const int most = int(std::clamp<int64_t>(units / (kPartsPerWorker * workers_), 1, kBatchUnits));
  std::vector<Batch> batches;
  for (int i = 0; i < int(units); ++i) {
    const Unit& unit = wave.units[size_t(i)];
    if (!batches.empty() && i - batches.back().first < most) {
      const Unit& first = wave.units[size_t(batches.back().first)];
      const bool same_sequence = slab.groups[size_t(first.group)].sequence == slab.groups[size_t(unit.group)].sequence;
      if (same_sequence && first.range == unit.range) {
        batches.back().last = i + 1;
        continue;
      }
    }
    batches.push_back({i, i + 1});
  }
  return batches;
}

// How many heads `absorb` takes at once: lines of the queries hold 16 heads, and each visit of one costs as much as a
// head's product with a token. But all workers shall have something to do.
int AttentionJob::absorb_heads(const Slab& slab) const {
  const int64_t parts = head_units(slab, kPartHeads);
  return int(slab.tokens.size()) >= kHeadTokens && parts >= kPartsPerWorker * workers_ ? kPartHeads : 1;
}

int64_t AttentionJob::head_units(const Slab& slab, int heads) const {
  return units_of(sizes_.heads, heads) * units_of(int64_t(slab.tokens.size()), kHeadTokens);
}

// Units of the same tokens follow each other: their lanes of the queries lie in the same lines, which stay in the L2 cache
// until all heads are there. W_UK is read once per kHeadTokens tokens, mostly from the L3 cache.
AttentionJob::HeadPart AttentionJob::head_part(const Slab& slab, int heads, int64_t unit) const {
  const int64_t parts = units_of(sizes_.heads, heads);
  const int64_t head = unit % parts * heads, token = unit / parts * kHeadTokens;
  return {head, int(std::min<int64_t>(heads, sizes_.heads - head)), token,
          int(std::min<int64_t>(kHeadTokens, int64_t(slab.tokens.size()) - token))};
}

void AttentionJob::absorb(const Slab& slab, const UnitQueue::Unit& unit, float* scratch) const {
  const int heads = absorb_heads(slab);
  const HeadPart part = head_part(slab, heads, unit.unit);
  const float* q[kHeadTokens];
  float* out[kHeadTokens * kPartHeads];
  for (int t = 0; t < part.tokens; ++t) {
    const SlabToken& token = slab.tokens[size_t(part.first_token + t)];
    q[t] = input_.q + (token.row * sizes_.heads + part.first_head) * (sizes_.nope + sizes_.rope);
    for (int h = 0; h < part.heads; ++h) {
      out[t * part.heads + h] = query_lane(token.first_lane + part.first_head + h);
    }
  }
  table_.absorb({.sizes = &sizes_,
                 .w_uk = weights(part.first_head, 0),
                 .next = unit.next < 0 ? nullptr : weights(head_part(slab, heads, unit.next).first_head, 0),
                 .bf16 = input_.kv_b_bf16,
                 .scale = scale_,
                 .heads = part.heads,
                 .tokens = part.tokens,
                 .q = q,
                 .out = out,
                 .scratch = scratch});
}

void AttentionJob::attend(const Slab& slab, const Wave& wave, const std::vector<Batch>& batches,
                          const UnitQueue::Unit& taken, float* scratch) const {
  const Batch& batch = batches[size_t(taken.unit)];
  const Span span = span_of(slab, wave, batch);
  float* wide = scratch + kAttendNumbers;
  const int lines = int(units_of(latent_bytes(), 64)), groups = batch.last - batch.first;
  for (int64_t first = span.begin; first < span.end; first += kBlockKeys) {
    const void *latents[kBlockKeys], *next[kBlockKeys];
    const int keys = find_latents({span.sequence, first, span.end}, latents);
    int next_keys = 0;
    if (first + kBlockKeys < span.end) {
      next_keys = find_latents({span.sequence, first + kBlockKeys, span.end}, next);
    } else if (taken.next >= 0) {
      next_keys = find_latents(span_of(slab, wave, batches[size_t(taken.next)]), next);
    }
    int widened = 0;
    for (int i = 0; i < groups; ++i) {
      const Unit& unit = wave.units[size_t(batch.first + i)];
      const Group& group = slab.groups[size_t(unit.group)];
      const int group_keys = int(std::min<int64_t>(keys, group.keys - first));
      if (group_keys <= 0) continue;
      int visible[kGroupRows];
      const int line = lines * i / groups;
      table_.attend({.sizes = &sizes_,
                     .latents = latents,
                     .bf16 = input_.pages.bf16,
                     .keys = group_keys,
                     .wide = wide,
                     .widened = widened,
                     .q = query_lane(int64_t(unit.group) * kGroupRows),
                     .visible = find_visible(group, first, group_keys, visible) ? nullptr : visible,
                     .first = first == span.begin,
                     .partial = partial(group.first_partial + unit.range),
                     .fetch = {next, next_keys, line, lines * (i + 1) / groups - line},
                     .scratch = scratch});
      widened = std::max(widened, group_keys);
    }
  }
}

// The keys that the last group of a batch, which sees most, attends to.
AttentionJob::Span AttentionJob::span_of(const Slab& slab, const Wave& wave, const Batch& batch) const {
  const Unit& last = wave.units[size_t(batch.last - 1)];
  const Group& group = slab.groups[size_t(last.group)];
  const int64_t* range = plan_.range_starts.data() + last.range;
  return {&input_.sequences[size_t(group.sequence)], range[0], std::min(range[1], group.keys)};
}

// Where the latents of a span's first block lie; returns how many there are.
int AttentionJob::find_latents(const Span& span, const void** latents) const {
  const LatentPages& pages = input_.pages;
  const int keys = int(std::min<int64_t>(kBlockKeys, span.end - span.begin));
  for (int key = 0; key < keys;) {
    const int64_t slot = pages.slot(*span.sequence, span.begin + key);
    const uint8_t* at = static_cast<const uint8_t*>(pages.data) + slot * latent_bytes();
    const int64_t page_end = key + pages.tokens - slot % pages.tokens;
    for (; key < keys && key < page_end; ++key, at += latent_bytes()) latents[key] = at;
  }
  return keys;
}

// How many of `keys` from `first` on each row sees; whether all see all.
bool AttentionJob::find_visible(const Group& group, int64_t first, int keys, int* visible) const {
  const int64_t cached = input_.sequences[size_t(group.sequence)].cached;
  if (first + keys <= cached + group.first_row / sizes_.heads + 1) return true;
  for (int row = 0; row < kGroupRows; ++row) {
    const int64_t position = cached + (group.first_row + row) / sizes_.heads;
    visible[row] = int(std::clamp<int64_t>(position + 1 - first, 0, keys));
  }
  return false;
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
  const HeadPart part = head_part(slab, 1, unit.unit);
  const float* contexts[kHeadTokens];
  float* out[kHeadTokens];
  for (int t = 0; t < part.tokens; ++t) {
    const int64_t token = part.first_token + t;
    contexts[t] = context(token * sizes_.heads + part.first_head);
    out[t] = input_.out + (slab.tokens[size_t(token)].row * sizes_.heads + part.first_head) * sizes_.value;
  }
  table_.expand({.sizes = &sizes_,
                 .w_uv = weights(part.first_head, sizes_.nope),
                 .next = unit.next < 0 ? nullptr : weights(head_part(slab, 1, unit.next).first_head, sizes_.nope),
                 .bf16 = input_.kv_b_bf16,
                 .tokens = part.tokens,
                 .context = contexts,
                 .out = out});
}

const uint8_t* AttentionJob::weights(int64_t head, int64_t row) const {
  const int64_t at = (head * (sizes_.nope + sizes_.value) + row) * sizes_.kv_lora;
  return static_cast<const uint8_t*>(input_.kv_b) + at * (input_.kv_b_bf16 ? 2 : 4);
}

int64_t AttentionJob::latent_bytes() const { return int64_t(sizes_.latent) * (input_.pages.bf16 ? 2 : 4); }

float* AttentionJob::query_lane(int64_t lane) const {
  return numbers(workspace_.queries) + lane / kPanelRows * kPanelRows * sizes_.latent + lane % kPanelRows;
}

// Tokens are a line more apart than their heads take: a power of two would put a head's rows of all tokens into the same
// few sets of a cache.
float* AttentionJob::context(int64_t row) const {
  return numbers(workspace_.contexts) + row * sizes_.context_width + row / sizes_.heads * kPanelRows;
}

Partial AttentionJob::partial(int64_t index) const {
  float* peak = numbers(workspace_.partials) + index * int64_t(partial_numbers(sizes_));
  return {peak, peak + kGroupRows, peak + 2 * kGroupRows};
}

}  // namespace k2
