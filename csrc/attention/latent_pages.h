// Where the latents of a call's sequences lie: pages of a cache, in any order.
#pragma once
#include <cstdint>

#include "attention/attention_plan.h"

namespace k2 {

struct LatentPages {
  const void* data;  // [count, tokens, latent]
  bool bf16;         // else fp32
  int64_t count;
  int64_t tokens;        // of a page
  const int64_t* table;  // [table_size], the pages of one sequence after the other
  int64_t table_size;

  // The place of a sequence's token, counted in tokens from `data`.
  int64_t slot(const AttentionSequence& sequence, int64_t token) const {
    return table[sequence.first_page + token / tokens] * tokens + token % tokens;
  }

  // ArgumentError unless the sequence's rows are among `rows` and its pages exist.
  void check(const AttentionSequence& sequence, int64_t rows) const;
};

}  // namespace k2
