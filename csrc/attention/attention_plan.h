// How one call of attention is cut: which rows share a group, which keys a range, and what is in memory at once.
//
// Nothing here depends on the number of threads, and a row's ranges only on its own position: so its bits do neither.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/attention.h"

namespace k2 {

// Fills in the derived sizes. ArgumentError for a size below 1.
MlaSizes mla_sizes(int heads, int nope, int rope, int value, int kv_lora);

// One sequence's part of a call: its new tokens and where the latents of all its tokens lie.
struct AttentionSequence {
  int64_t first_row;   // of the call's tokens
  int64_t rows;        // new tokens
  int64_t cached;      // tokens before them
  int64_t first_page;  // in the call's page table
};

// 32 rows: heads of one token, or of neighbouring tokens of one sequence.
struct Group {
  int sequence;
  int rows;             // the others of kGroupRows are padding
  int64_t first_row;    // token * heads + head, counted from the sequence's first new token
  int64_t context_row;  // of its first row, in the slab
  int64_t keys;         // that its last row sees
  int ranges;
  int first_partial;  // in its wave
};

struct Unit {
  int group;
  int range;
};

// Groups whose partials are in memory at once.
struct Wave {
  int first_group;
  int last_group;
  std::vector<Unit> units;  // large ones first
};

struct SlabToken {
  int64_t row;         // of the call
  int64_t first_lane;  // of its first head: group * kGroupRows + lane
};

// Tokens whose queries and contexts are in memory at once.
struct Slab {
  std::vector<SlabToken> tokens;
  std::vector<Group> groups;
  std::vector<Wave> waves;
};

struct AttentionPlan {
  std::vector<int64_t> range_starts;  // and the end of the last one
  std::vector<Slab> slabs;
  size_t max_groups = 0;    // of a slab
  size_t max_tokens = 0;    // of a slab
  size_t max_partials = 0;  // of a wave
};

// Numbers of one partial.
size_t partial_numbers(const MlaSizes& sizes);

AttentionPlan plan_attention(const MlaSizes& sizes, const std::vector<AttentionSequence>& sequences);

}  // namespace k2
