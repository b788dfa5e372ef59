#include "attention/attention_plan.h"

#include <algorithm>

#include "core/error.h"

namespace k2 {
namespace {

// 8192 rows of K2.6 take 19 MB as queries and 17 MB as contexts. W_UK and W_UV are read once per slab: 17 MB for 128
// tokens of 64 heads, which take 18 ms of one core even behind an empty cache.
constexpr int64_t kSlabRows = 8192;

constexpr size_t kPartialBytes = size_t(64) << 20;

// A range has one block, or more but at most 1/32 of the keys before it: enough ranges for many threads, and only 235
// of them for 262144 tokens.
constexpr int64_t kRangeShare = 32;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

std::vector<int64_t> make_range_starts(int64_t keys) {
  std::vector<int64_t> starts = {0};
  int64_t size = kBlockKeys;
  while (starts.back() < keys) {
    if (starts.back() >= 2 * size * kRangeShare) size *= 2;
    starts.push_back(starts.back() + size);
  }
  return starts;
}

class Planner {
 public:
  Planner(const MlaSizes& sizes, const std::vector<AttentionSequence>& sequences)
      : sizes_(sizes), sequences_(sequences) {}

  AttentionPlan plan() {
    int64_t keys = 0;
    for (const AttentionSequence& s : sequences_) keys = std::max(keys, s.cached + s.rows);
    plan_.range_starts = make_range_starts(keys);
    for (int i = 0; i < int(sequences_.size()); ++i) add_sequence(i);
    close_slab();
    return std::move(plan_);
  }

 private:
  void add_sequence(int sequence) {
    const int64_t slab_tokens = std::max<int64_t>(1, kSlabRows / sizes_.heads);
    const int64_t rows = sequences_[sequence].rows;
    for (int64_t token = 0; token < rows;) {
      const int64_t count = std::min(rows - token, slab_tokens - int64_t(slab_.tokens.size()));
      add_tokens(sequence, token, count);
      token += count;
      if (int64_t(slab_.tokens.size()) == slab_tokens) close_slab();
    }
  }

  void add_tokens(int sequence, int64_t first_token, int64_t count) {
    const int64_t first_group = int64_t(slab_.groups.size());
    const int64_t context_row = int64_t(slab_.tokens.size()) * sizes_.heads;
    for (int64_t t = 0; t < count; ++t) {
      slab_.tokens.push_back({sequences_[sequence].first_row + first_token + t,
                              first_group * kGroupRows + t * sizes_.heads});
    }
    const int64_t rows = count * sizes_.heads;
    for (int64_t row = 0; row < rows; row += kGroupRows) {
      const int64_t group_rows = std::min<int64_t>(kGroupRows, rows - row);
      const int64_t keys =
          sequences_[sequence].cached + first_token + (row + group_rows - 1) / sizes_.heads + 1;
      const auto& starts = plan_.range_starts;
      const int ranges = int(std::lower_bound(starts.begin(), starts.end(), keys) - starts.begin());
      slab_.groups.push_back(
          {sequence, int(group_rows), first_token * sizes_.heads + row, context_row + row, keys, ranges, 0});
    }
  }

  void close_slab() {
    if (slab_.tokens.empty()) return;
    const size_t room = kPartialBytes / (partial_numbers(sizes_) * sizeof(float));
    size_t partials = 0;
    for (int g = 0; g < int(slab_.groups.size()); ++g) {
      Group& group = slab_.groups[g];
      if (slab_.waves.empty() || partials + group.ranges > room) {
        slab_.waves.push_back({g, g, {}});
        partials = 0;
      }
      group.first_partial = int(partials);
      partials += group.ranges;
      slab_.waves.back().last_group = g + 1;
      plan_.max_partials = std::max(plan_.max_partials, partials);
    }
    for (Wave& wave : slab_.waves) list_units(wave);
    plan_.max_groups = std::max(plan_.max_groups, slab_.groups.size());
    plan_.max_tokens = std::max(plan_.max_tokens, slab_.tokens.size());
    plan_.slabs.push_back(std::move(slab_));
    slab_ = {};
  }

  // Groups of one sequence come side by side for each range: the second one finds its latents in a cache.
  void list_units(Wave& wave) const {
    for (int first = wave.first_group; first < wave.last_group;) {
      int last = first, ranges = 0;
      while (last < wave.last_group && slab_.groups[last].sequence == slab_.groups[first].sequence) {
        ranges = std::max(ranges, slab_.groups[last++].ranges);
      }
      for (int range = ranges - 1; range >= 0; --range) {
        for (int g = first; g < last; ++g) {
          if (range < slab_.groups[g].ranges) wave.units.push_back({g, range});
        }
      }
      first = last;
    }
  }

  const MlaSizes& sizes_;
  const std::vector<AttentionSequence>& sequences_;
  AttentionPlan plan_;
  Slab slab_;
};

}  // namespace

MlaSizes mla_sizes(int heads, int nope, int rope, int value, int kv_lora) {
  for (const int size : {heads, nope, rope, value, kv_lora}) check_argument(size >= 1, "attention", "sizes >= 1", size);
  MlaSizes s = {heads, nope, rope, value, kv_lora, 0, 0, 0, 0};
  s.latent = kv_lora + rope;
  s.context_rows = int(round_up(kv_lora, kContextStep));
  s.context_width = int(round_up(kv_lora, kPanelRows));
  s.latent_stride = int(round_up(std::max(s.latent, s.context_rows), kPanelRows));
  return s;
}

size_t partial_numbers(const MlaSizes& sizes) {
  return size_t(kGroupRows) * (size_t(sizes.context_rows) + 2);
}

AttentionPlan plan_attention(const MlaSizes& sizes, const std::vector<AttentionSequence>& sequences) {
  return Planner(sizes, sequences).plan();
}

}  // namespace k2
