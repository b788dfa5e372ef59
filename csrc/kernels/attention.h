// What one instruction set offers for attention over cached latents, as plain pointers; see attention-inl.h.
//
// Rows are pairs of a query token and a head. They lie side by side in vectors: a panel holds 16 of them, a group two
// panels, [panel][depth][16]. All rows of a group attend to the same latents, which are widened once for several groups.
//
// Plain data only: this header is included by files that are compiled for one instruction set.
#pragma once
#include <stdint.h>

namespace k2 {

constexpr int kPanelRows = 16;
constexpr int kPanels = 2;
constexpr int kGroupRows = kPanels * kPanelRows;

// Latents of one call of `attend`. In fp32 they take 221 KB at 576 columns: with a group's queries (74 KB) and sums
// (66 KB) they stay in an L2 cache of 512 KB. Fewer would load and store the sums more often.
constexpr int kBlockKeys = 96;

constexpr int kAttendNumbers = (kBlockKeys + 1) * kGroupRows;  // of the scratch of `attend`

// Columns of a context are padded to this multiple, so that tiles of 6 and of 12 columns need no remainder.
constexpr int kContextStep = 12;

constexpr int kHeadTokens = 16;  // most tokens of one call of `absorb` or `expand`
constexpr int kPartHeads = 4;    // most heads of one call of `absorb`

// Sizes of one model's attention.
struct MlaSizes {
  int heads;
  int nope;
  int rope;
  int value;
  int kv_lora;

  // Not inline functions: those would have linkage. Filled by mla_sizes().
  int latent;         // kv_lora + rope
  int context_rows;   // kv_lora, padded to kContextStep
  int context_width;  // kv_lora, padded to 16
  int latent_stride;  // of a widened latent
};

// Moves W_UK of neighbouring heads to their queries: out = scale * (q_nope . W_UK | q_rope), into the lanes of panels.
struct AbsorbTask {
  const MlaSizes* sizes;
  const void* w_uk;  // [nope, kv_lora] of the first head; that of the next is (nope + value) * kv_lora numbers on
  const void* next;  // of the call that follows, to be asked for, or null
  bool bf16;         // else fp32
  float scale;
  int heads;              // 1..kPartHeads
  int tokens;             // 1..kHeadTokens
  const float* const* q;  // [tokens] of [heads][nope + rope]
  float* const* out;      // [tokens][heads] one lane of a panel [latent][16]
  float* scratch;         // [heads][tokens][context_width + 16]
};

// What the rows of a group have seen so far: sums are relative to the highest score.
struct Partial {
  float* peak;     // [kGroupRows]
  float* total;    // [kGroupRows]
  float* context;  // [kPanels][context_rows][16]
};

// Latents that will be widened soon, to be asked for meanwhile: so many lines of each from `line` on.
struct LatentFetch {
  const void* const* latents;  // [keys]
  int keys;
  int line;
  int lines;
};

// Attends from one group to a block of latents.
struct AttendTask {
  const MlaSizes* sizes;
  const void* const* latents;  // [keys] rows of the cache
  bool bf16;                   // else fp32
  int keys;                    // 1..kBlockKeys
  float* wide;                 // [kBlockKeys][latent_stride], the latents in fp32
  int widened;                 // how many of them are there already; the others will be
  const float* q;              // [kPanels][latent][16]
  const int* visible;          // [kGroupRows] how many keys of the block a row sees, or null where all see all
  bool first;                  // the partial holds nothing yet
  Partial partial;
  LatentFetch fetch;
  float* scratch;  // [kAttendNumbers]
};

// Joins the partials of a panel: out = sum over ranges of their contexts / sum of their totals, for some columns.
struct MergeTask {
  const MlaSizes* sizes;
  const Partial* partials;  // [ranges], at least one
  int ranges;
  int panel;
  int first_column;   // a multiple of 16
  int columns;        // so many, or until context_width
  float* const* out;  // [16] rows of context_width numbers, zeros behind kv_lora; null for a lane without a row
};

// out = W_UV . context for one head.
struct ExpandTask {
  const MlaSizes* sizes;
  const void* w_uv;  // [value, kv_lora]
  const void* next;  // of the call that follows, to be asked for, or null
  bool bf16;         // else fp32
  int tokens;        // 1..kHeadTokens
  const float* const* context;  // [tokens] of context_width numbers
  float* const* out;            // [tokens] of value numbers
};

struct AttentionTable {
  const char* name;  // instruction set
  void (*absorb)(const AbsorbTask& task);
  void (*attend)(const AttendTask& task);
  void (*merge)(const MergeTask& task);
  void (*expand)(const ExpandTask& task);

  // FMAs with nothing else around them. The result only keeps them alive.
  uint64_t (*peak)(int64_t rounds);
  int64_t peak_operations;  // multiplications and additions of a round
};

}  // namespace k2
