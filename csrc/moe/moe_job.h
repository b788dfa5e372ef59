// One evaluation of a MoE layer's routed experts:
//   output[t] = sum over k of weights[t, k] * expert[ids[t, k]](hidden[t]), added in ascending order of the expert.
// An id of kElsewhere adds nothing.
//
// Each NUMA node computes its part (moe_part.h); with several nodes, their partial sums are added in the order of the
// nodes when all parts are done.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"
#include "moe/expert_layer.h"
#include "moe/moe_part.h"
#include "moe/routing.h"
#include "runtime/workspace.h"

namespace k2 {

// The arguments, checked for shape; the memory is the caller's.
struct MoeInput {
  const void* hidden;  // [tokens, H]
  bool bf16;           // else fp32
  const int32_t* ids;  // [tokens, K]
  const float* weights;
  int tokens;
};

class MoeJob final : public Job {
 public:
  // `output` [tokens, H] is the caller's, as are the hidden rows until the job has ended. Without an output the rows are
  // copied here, and the results wait for `copy_output`. ids and weights are not needed any more after this.
  // The layer has as many nodes as the pool. ArgumentError for an id out of range, EngineError for an expert that was
  // not loaded.
  MoeJob(ThreadPool& pool, const KernelTable& table, const Tuning& tuning, const ExpertLayer& layer,
         WorkspaceStore& store, const MoeInput& input, float* output = nullptr);
  ~MoeJob() override;

  // Writes [tokens, H], of a job without an output of the caller; only after completion.
  void copy_output(float* out) const;
  int tokens() const { return tokens_; }

 private:
  void check_ids(const MoeInput& input) const;
  const uint8_t* copy_hidden(const MoeInput& input);
  void run(Team& team, int worker) override;
  void add_partial_sums(Share share);

  const ThreadPool& pool_;
  const ExpertLayer& layer_;
  WorkspaceStore& store_;
  const int tokens_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<RoutedChunk> chunks_;
  std::vector<std::unique_ptr<MoePart>> parts_;  // [nodes]
};

}  // namespace k2
