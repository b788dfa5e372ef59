#include "moe/routing.h"

#include <algorithm>

namespace k2 {
namespace {

// The cost of a unit in reads of its weights.
double unit_cost(int tokens, float token_cost) { return std::max(1.0, double(token_cost) * tokens); }

}  // namespace

RoutedChunk route(const int32_t* ids, const float* weights, int first_token, int tokens, int per_token, int experts) {
  RoutedChunk chunk{first_token, tokens, {}, {}};
  std::vector<int> next(experts + 1, 0);  // counting sort: counts, then places
  const int64_t total = int64_t(tokens) * per_token;
  for (int64_t i = 0; i < total; ++i) {
    if (ids[i] != kElsewhere) ++next[ids[i] + 1];
  }
  for (int expert = 0; expert < experts; ++expert) {
    const int rows = next[expert + 1];
    if (rows > 0) chunk.experts.push_back({expert, next[expert], rows});
    next[expert + 1] += next[expert];
  }
  chunk.rows.resize(size_t(next[experts]));
  for (int64_t i = 0; i < total; ++i) {
    if (ids[i] != kElsewhere) chunk.rows[next[ids[i]]++] = {int(i / per_token), weights[i]};
  }
  return chunk;
}

WorkCut cut_work(const RoutedChunk& chunk, int units, float token_cost, int worker, int workers) {
  if (worker >= workers) return {int(chunk.experts.size()), 0};
  double total = 0;
  for (const ActiveExpert& expert : chunk.experts) total += unit_cost(expert.rows, token_cost) * units;
  double before = total * worker / workers;
  for (int i = 0; i < int(chunk.experts.size()); ++i) {
    const double cost = unit_cost(chunk.experts[i].rows, token_cost);
    if (before < cost * units) return {i, int(before / cost)};
    before -= cost * units;
  }
  return {int(chunk.experts.size()), 0};
}

}  // namespace k2
