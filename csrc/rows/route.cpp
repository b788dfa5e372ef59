#include "rows/route.h"

#include <cmath>

#include "rows/activation.h"

namespace k2 {
namespace {

constexpr float kNoScore = 1e-20f;  // as NO_SCORE in hybrid_k2/model/router.py

bool before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

}  // namespace

void route(const float* logits, const RouterRule& rule, float* scores, int32_t* ids, float* weights) {
  sigmoid(logits, rule.experts, scores);
  float* biased = weights;  // of the chosen ones, until all are chosen
  int count = 0;
  for (int expert = 0; expert < rule.experts; ++expert) {
    const float value = scores[expert] + rule.bias[expert];
    if (count == rule.chosen && !before(value, biased[count - 1])) continue;
    int place = count < rule.chosen ? count++ : count - 1;
    for (; place > 0 && before(value, biased[place - 1]); --place) {
      biased[place] = biased[place - 1];
      ids[place] = ids[place - 1];
    }
    biased[place] = value;
    ids[place] = expert;
  }
  float sum = 0;
  for (int k = 0; k < count; ++k) sum += scores[ids[k]];
  for (int k = 0; k < count; ++k) {
    const float score = scores[ids[k]];
    weights[k] = (rule.normalise ? score / (sum + kNoScore) : score) * rule.scale;
  }
}

}  // namespace k2
