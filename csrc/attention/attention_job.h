// Attention of one layer over the latents of a paged cache: absorb, attend, merge, expand on all workers.
//
// absorb  W_UK moves to the queries, head by head, which land in the panels of their groups
// attend  each unit (a group and a range of keys) makes a partial
// merge   the partials of a group become contexts
// expand  W_UV turns contexts into values, head by head
// Whoever is free takes a unit, and none of them depends on who computes it. A worker knows what it takes next, and asks
// for its weights and latents while it computes.
#pragma once
#include <cstdint>
#include <vector>

#include "attention/attention_plan.h"
#include "attention/latent_pages.h"
#include "core/huge_buffer.h"
#include "cpu/thread_pool.h"
#include "cpu/unit_queue.h"
#include "kernels/attention.h"

namespace k2 {

// The memory is the caller's and must outlive the job.
struct AttentionInput {
  const float* q;  // [tokens, heads, nope + rope]
  int64_t tokens;
  const void* kv_b;  // [heads, nope + value, kv_lora]
  bool kv_b_bf16;    // else fp32
  LatentPages pages;
  std::vector<AttentionSequence> sequences;
  float* out;  // [tokens, heads, value]; rows of no sequence are left alone
};

// Scratch memory, kept from call to call.
struct AttentionWorkspace {
  HugeBuffer queries;   // [groups, kPanels, latent, 16]
  HugeBuffer contexts;  // [tokens, heads * context_width + 16]
  HugeBuffer partials;  // [partials, partial_numbers]
  HugeBuffer scratch;   // [workers, scratch_numbers]

  size_t bytes() const { return queries.bytes() + contexts.bytes() + partials.bytes() + scratch.bytes(); }
};

class AttentionJob final : public Job {
 public:
  // ArgumentError for rows or pages that do not exist.
  AttentionJob(ThreadPool& pool, const AttentionTable& table, const MlaSizes& sizes, float scale,
               AttentionInput input, AttentionWorkspace& workspace);

 private:
  void run(Team& team, int worker) override;
  void plan_phases();
  // Units of a wave that a worker takes at once: those of some groups of one sequence and the same range.
  struct Batch {
    int first;
    int last;
  };
  struct Phase {
    UnitQueue queue;
    std::vector<Batch> batches;  // of `attend`
  };
  // Some keys of a sequence.
  struct Span {
    const AttentionSequence* sequence;
    int64_t begin;
    int64_t end;
  };
  // Some heads and tokens of a slab.
  struct HeadPart {
    int64_t first_head;
    int heads;
    int64_t first_token;
    int tokens;
  };

  // Calls `work` with units of the phase that nobody has taken yet, until none is left.
  template <class Work>
  void take_units(Team& team, int worker, Phase& phase, Work work);

  void absorb(const Slab& slab, const UnitQueue::Unit& unit, float* scratch) const;
  void attend(const Slab& slab, const Wave& wave, const std::vector<Batch>& batches, const UnitQueue::Unit& taken,
              float* scratch) const;
  void merge(const Slab& slab, const Wave& wave, int64_t unit, std::vector<Partial>& partials) const;
  void expand(const Slab& slab, const UnitQueue::Unit& unit) const;

  std::vector<Batch> make_batches(const Slab& slab, const Wave& wave) const;
  HeadPart head_part(const Slab& slab, int heads, int64_t unit) const;
  Span span_of(const Slab& slab, const Wave& wave, const Batch& batch) const;
  int find_latents(const Span& span, const void** latents) const;
  bool find_visible(const Group& group, int64_t first, int keys, int* visible) const;
  int absorb_heads(const Slab& slab) const;
  int64_t head_units(const Slab& slab, int heads) const;
  int64_t merge_units(const Wave& wave) const;
  const uint8_t* weights(int64_t head, int64_t row) const;
  int64_t latent_bytes() const;
  float* query_lane(int64_t lane) const;
  float* context(int64_t row) const;
  Partial partial(int64_t index) const;

  const int workers_;
  const AttentionTable& table_;
  const MlaSizes sizes_;
  const float scale_;
  const AttentionInput input_;
  AttentionPlan plan_;
  AttentionWorkspace& workspace_;
  std::vector<Phase> phases_;  // in the order of `run`
};

}  // namespace k2
