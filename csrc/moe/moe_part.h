// One NUMA node's part of a layer's evaluation: its slice of the intermediate channels of all experts, computed by the
// node's own workers from its own memory. What comes out is a partial sum of the output; parts meet nowhere before that.
//
// Three steps per chunk of tokens, each cut into one contiguous share per worker of the node:
//   pack      tokens: hidden rows into the kernel's activation format; each node has its own copy;
//   gate_up   units of 32 intermediate channels of the slice, over all active experts, cut by cost;
//   down      rows of the output, over all active experts: each worker owns its columns of the output, so there is no
//             atomic and no reduction, and the order of additions does not depend on the number of workers.
// `down` of an expert starts when all of that expert's gate_up units are done (a counter per expert), not when all
// workers are done with all experts.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/share.h"
#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"
#include "moe/expert_layer.h"
#include "moe/routing.h"
#include "runtime/workspace.h"

namespace k2 {

// Hidden rows [tokens, H], fp32 or bf16.
struct HiddenRows {
  const uint8_t* data;
  bool bf16;
};

class MoePart {
 public:
  // `workers` are those of the node. `memory` is of this part alone. The partial sums go to `output` [tokens, H], or to `memory` where that is null. What
  // is named here must outlive the part.
  MoePart(const KernelTable& table, const Tuning& tuning, const ExpertLayer& layer, int node, int workers,
          const std::vector<RoutedChunk>& chunks, HiddenRows hidden, PartMemory& memory, float* output);

  // On each worker of the node. Throws Cancelled.
  void run(Team& team, int worker);

  // The partial sums [tokens, H]; only after all workers of the node have left `run`.
  float* output_row(int token) const { return output_ + int64_t(token) * layer_.shape().hidden; }

 private:
  struct ChunkState {
    std::unique_ptr<std::atomic<int>[]> units_done;   // [active experts]
    std::unique_ptr<std::atomic<bool>[]> row_bad;     // [rows] an intermediate value has no packed form
    std::unique_ptr<std::atomic<bool>[]> token_bad;   // [tokens] the input has no packed form
  };

  void pack(const RoutedChunk& chunk, ChunkState& state, Share share);
  void gate_up(const RoutedChunk& chunk, ChunkState& state, Team& team, Share share);
  void gate_up_expert(const RoutedChunk& chunk, ChunkState& state, const ActiveExpert& expert, int first_pair,
                      int last_pair, const Team& team, int rank);
  void down(const RoutedChunk& chunk, const ChunkState& state, Team& team, Share share);
  void down_expert(const RoutedChunk& chunk, const ChunkState& state, const ActiveExpert& expert, int first_block,
                   int last_block, const Team& team, int rank);

  uint8_t* packed(int token) const { return memory_.packed.data() + token * packed_bytes_; }
  uint8_t* scratch(int rank) const { return memory_.scratch.data() + rank * scratch_bytes_; }
  uint8_t* activated(int row) const { return memory_.activated.data() + row * activated_bytes_; }

  const KernelTable& table_;
  const Tuning tuning_;
  const ExpertLayer& layer_;
  const int node_;
  const int pairs_;  // groups of 32 intermediate channels in the slice
  const std::vector<RoutedChunk>& chunks_;
  const HiddenRows hidden_;
  PartMemory& memory_;
  float* output_;
  const int64_t packed_bytes_;     // of one token's hidden
  const int64_t activated_bytes_;  // of one row's slice of the intermediate
  const int64_t scratch_bytes_;    // of one worker
  std::atomic<int> arrived_{0};    // workers of the node, at its barriers
  std::vector<ChunkState> states_;
};

}  // namespace k2
