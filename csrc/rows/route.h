// The choice of a token's experts.
#pragma once
#include <cstdint>

namespace k2 {

struct RouterRule {
  const float* bias;  // [experts], added to the scores to choose
  int experts;
  int chosen;  // 1..experts
  bool normalise;
  float scale;
};

// Scores experts by the sigmoid of their logits; chooses by score plus bias, best first, the lower index where they tie
// and NaN before all numbers; weighs by score alone. `scores` is scratch memory.
// logits, scores [experts]; ids, weights [chosen].
void route(const float* logits, const RouterRule& rule, float* scores, int32_t* ids, float* weights);

}  // namespace k2
