// What one instruction set offers, as plain pointers. A file compiled for an instruction set exports one table and
// nothing else; everything above calls through the table and is compiled for the baseline.
//
// Plain data only: this header is included by files that are compiled for one instruction set.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace k2 {

// How activations are represented and multiplied; the weights are the same for all.
enum Numerics { kExact, kFast, kBf16, kNumericsCount };

constexpr int kMaxTokens = 64;  // no table takes more tokens in one call: one bit each in gate_up's result

// How a kernel goes about a call. It changes the speed alone, never a result.
struct CallPolicy {
  int streams = 4;           // address streams of a one-token call: 1, 2 or 4
  int prefetch_one = 0;      // bytes ahead of its reads that such a call asks for into the L2 cache; 0: it does not
  int prefetch_many = 9216;  // the same for more tokens
  int tiles_from = 4;        // tokens from which a table that has tile instructions uses them
};

// What work is arranged by on a machine. It changes the speed alone, never a result.
struct Tuning {
  CallPolicy policy = {};
  // What one more token costs where multiplying is the limit, in reads of the weights by one worker among all: a unit of
  // work costs max(1, tokens * token_cost).
  float token_cost = 1;
};

// silu(gate . x) * (up . x) for `pairs` consecutive pairs of w13 row blocks of one expert.
struct GateUpTask {
  const uint8_t* weights;       // first row block of the first pair, 64-byte aligned
  int groups;                   // H / 32
  int pairs;                    // each gives 32 intermediate channels
  int tokens;                   // 1..max_tokens
  const uint8_t* const* input;  // [tokens] packed activations of H inputs
  uint8_t* const* output;       // [tokens] packed group of the first pair; the following groups lie behind it
  CallPolicy policy = {};
  uint8_t* scratch = nullptr;   // scratch_bytes(table, groups), 64-byte aligned; null where that is 0
};

// output += factor * (down . x) for `blocks` consecutive row blocks of one expert.
struct DownTask {
  const uint8_t* weights;       // first row block, 64-byte aligned
  int groups;                   // I / 32, or a slice of it
  int blocks;                   // row blocks of 32 outputs
  int tokens;                   // 1..max_tokens
  ptrdiff_t stride_bytes;       // from one row block to the next
  const uint8_t* const* input;  // [tokens] packed activations of the groups
  const float* factor;          // [tokens] routing weights
  float* const* output;         // [tokens] first of blocks * 32 floats
  CallPolicy policy = {};
  uint8_t* scratch = nullptr;  // as in GateUpTask
};

struct KernelTable {
  const char* name = nullptr;         // instruction set, as HYBRID_K2_ISA names it
  Numerics numerics = kExact;         // what it computes
  const char* activations = nullptr;  // their form: "A16"
  int max_tokens = 0;                 // most tokens in one call: their activations should stay in the L2 cache
  bool words = false;                 // A16 as A16Words instead of A16Group
  // Most tokens whose activations are in scratch at once, 53 KB each at full size. The weights are read anew for each such
  // chunk: a read should hide behind the multiplications, which at 1024 tokens are 21 per expert.
  int chunk_tokens = 1024;
  int group_bytes = 0;                // one token's group of 32 packed activations
  int scratch_group_bytes = 0;        // the same in the form of a kernel that arranges the tokens of a call anew

  // Packs `groups` groups of activations. False if a value has no packed form (NaN, infinity, out of range).
  bool (*pack_fp32)(const float* x, int groups, uint8_t* packed) = nullptr;
  bool (*pack_bf16)(const uint16_t* x, int groups, uint8_t* packed) = nullptr;

  // Returns the tokens (bit t) for which an intermediate value has no packed form.
  uint64_t (*gate_up)(const GateUpTask& task) = nullptr;
  void (*down)(const DownTask& task) = nullptr;

  // Reads memory as fast as the instruction set can; bytes is a multiple of 256. The result only keeps the reads alive.
  uint64_t (*read)(const uint8_t* memory, size_t bytes) = nullptr;

  // Runs nothing but the instructions that multiply and add, from registers, as fast as they go: the limit of a large
  // batch. One round is worth `peak_operations` multiplications and additions of weights with activations: where these
  // numerics take an instruction twice (two planes), it counts half. The result only keeps the work alive.
  uint64_t (*peak)(int64_t rounds) = nullptr;
  int64_t peak_operations = 0;

  bool has_tiles = false;  // calls of CallPolicy::tiles_from tokens or more take another way

  // Where nobody has measured the machine: one core that has the memory to itself.
  Tuning tuning = {};
};

// Of one worker's calls on matrices of so many groups of inputs.
inline size_t scratch_bytes(const KernelTable& table, int groups) {
  return size_t(table.max_tokens) * size_t(groups) * size_t(table.scratch_group_bytes);
}

}  // namespace k2
