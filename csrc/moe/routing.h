// Tokens grouped by expert: which rows each expert computes, and how the work is cut among the workers.
#pragma once
#include <cstdint>
#include <vector>

namespace k2 {

// A token's use of one expert.
struct RoutedRow {
  int token;  // within the chunk
  float weight;
};

struct ActiveExpert {
  int expert;
  int first_row;  // in `rows`
  int rows;
};

// The number of an expert that is computed elsewhere: here it adds nothing.
constexpr int kElsewhere = -1;

// A chunk of tokens. Experts ascend; an expert's rows ascend by token, then by k.
struct RoutedChunk {
  int first_token;
  int tokens;
  std::vector<ActiveExpert> experts;
  std::vector<RoutedRow> rows;  // tokens * K, less those that are elsewhere
};

// ids and weights: [tokens, K], of the chunk alone; ids are in 0..experts-1, or kElsewhere.
RoutedChunk route(const int32_t* ids, const float* weights, int first_token, int tokens, int per_token, int experts);

// A place in the work of a chunk: before `unit` of the `index`th active expert.
struct WorkCut {
  int index;
  int unit;
};

// Where worker `worker`'s contiguous share begins (it ends where the next one's begins), when every active expert is
// `units` units of work and a unit costs max(1, token_cost * the tokens that it serves).
WorkCut cut_work(const RoutedChunk& chunk, int units, float token_cost, int worker, int workers);

}  // namespace k2
