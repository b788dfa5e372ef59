// One evaluation of a MoE layer's routed experts:
//   output[t] = sum over k of weights[t, k] * expert[ids[t, k]](hidden[t]), added in ascending order of the expert.
//
// Three steps per chunk of tokens, each cut into one contiguous share per worker:
//   pack      tokens: hidden rows into the kernel's activation format;
//   gate_up   units of 32 intermediate channels, over all active experts, cut by cost;
//   down      rows of the output, over all active experts: each worker owns its columns of the output, so there is no
//             atomic and no reduction, and the order of additions does not depend on the number of workers.
// `down` of an expert starts when all of that expert's gate_up units are done (a counter per expert), not when all
// workers are done with all experts.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"
#include "moe/expert_layer.h"
#include "moe/routing.h"
#include "moe/workspace.h"

namespace k2 {

// The arguments, checked for shape; the memory is the caller's and is copied by the constructor of MoeJob.
struct MoeInput {
  const void* hidden;  // [tokens, H]
  bool bf16;           // else fp32
  const int32_t* ids;  // [tokens, K]
  const float* weights;
  int tokens;
};

class MoeJob final : public Job {
 public:
  // ArgumentError for an id out of range, EngineError for an expert that was not loaded.
  MoeJob(ThreadPool& pool, const KernelTable& table, const ExpertLayer& layer, WorkspaceStore& store,
         const MoeInput& input);
  ~MoeJob() override;

  // Writes [tokens, H]; only after completion.
  void copy_output(float* out) const;
  int tokens() const { return tokens_; }

 private:
  struct Chunk {
    RoutedChunk routed;
    std::unique_ptr<std::atomic<int>[]> units_done;  // [active experts]
    std::unique_ptr<std::atomic<bool>[]> row_bad;    // [rows] an intermediate value has no packed form
  };

  void check_ids(const MoeInput& input) const;
  void run(Team& team, int worker) override;
  void pack(const Chunk& chunk, const Team& team, int worker);
  void gate_up(Chunk& chunk, Team& team, int worker);
  void gate_up_expert(Chunk& chunk, const ActiveExpert& expert, int first_pair, int last_pair, const Team& team);
  void down(Chunk& chunk, Team& team, int worker);
  void down_expert(const Chunk& chunk, const ActiveExpert& expert, int first_block, int last_block, const Team& team);

  uint8_t* packed(int token) const { return workspace_->packed.data() + token * packed_bytes_; }
  uint8_t* activated(int row) const { return workspace_->activated.data() + row * activated_bytes_; }
  float* output_row(int token) const {
    return reinterpret_cast<float*>(workspace_->output.data()) + int64_t(token) * layer_.shape().hidden;
  }

  const KernelTable& table_;
  const ExpertLayer& layer_;
  WorkspaceStore& store_;
  std::unique_ptr<Workspace> workspace_;
  const int tokens_;
  const bool bf16_;
  const int64_t packed_bytes_;                      // of one token's hidden
  const int64_t activated_bytes_;                   // of one row's intermediate
  std::unique_ptr<std::atomic<bool>[]> token_bad_;  // [tokens] the input has no packed form
  std::vector<Chunk> chunks_;
};

}  // namespace k2
