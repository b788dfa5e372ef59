#include "moe/tuning_probe.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/huge_buffer.h"
#include "cpu/share.h"
#include "kernels/l32.h"
#include "runtime/timing.h"

namespace k2 {
namespace {

constexpr int kGroups = 224;  // 7168 inputs
constexpr size_t kPairBytes = size_t(2) * kGroups * kBlockBytes;
// A worker's share of the 8 experts of one token: 512 pairs, on 16 workers. A pass is then long against its start.
constexpr int kPairsPerWorker = 32;
constexpr int kFewTokens = 4;
constexpr int kManyTokens = 12;  // where multiplying is the limit, if it ever is
constexpr int kTileTokens[] = {32, 16, 8, 4};  // where tiles are tried, from where they win most
constexpr int kMinRounds = 3;
constexpr double kClearly = 0.97;  // of the time of the policy so far
constexpr float kLeastCost = 0.01f, kMostCost = 100;

// Weights that no cache holds, read round and round.
struct Weights {
  Weights(ThreadPool& pool, size_t bytes)
      : pairs(int(std::min<size_t>(bytes / kPairBytes, 1 << 20))),
        per_pass(std::min(pairs / 4, kPairsPerWorker * pool.workers())) {
    check_argument(per_pass >= pool.workers(), "bytes", text("at least ", 4 * pool.workers() * kPairBytes), bytes);
    buffer = HugeBuffer(pairs * kPairBytes);
  }

  // Where the next pass begins.
  int take() {
    if (next + per_pass > pairs) next = 0;
    const int first = next;
    next += per_pass;
    return first;
  }

  const int pairs;
  const int per_pass;
  HugeBuffer buffer;
  int next = 0;
};

// Writes the buffer for the first time: the memory comes to be. Zero is a scale that can be computed with.
class Touch final : public Job {
 public:
  Touch(ThreadPool& pool, const HugeBuffer& buffer) : Job(pool), buffer_(buffer) {}

 private:
  void run(Team& team, int worker) override {
    const Share share{worker, team.workers()};
    const int64_t lines = int64_t(buffer_.bytes() / 64);
    const size_t first = size_t(share.begin(lines)) * 64, last = size_t(share.end(lines)) * 64;
    std::memset(buffer_.data() + first, 0, last - first);
  }

  const HugeBuffer& buffer_;
};

// gate_up of the pairs of one pass, cut among the workers as a layer's are.
class Pass final : public Job {
 public:
  Pass(ThreadPool& pool, const KernelTable& table, Weights& weights, int tokens, const CallPolicy& policy)
      : Job(pool),
        table_(table),
        weights_(weights.buffer.data() + weights.take() * kPairBytes),
        pairs_(weights.per_pass),
        tokens_(tokens),
        policy_(policy) {}

 private:
  void run(Team& team, int worker) override {
    const Share share{worker, team.workers()};
    const int first = share.begin(pairs_), last = share.end(pairs_);
    const std::vector<uint8_t> input(size_t(kGroups) * table_.group_bytes);
    std::vector<uint8_t> output(size_t(last - first) * table_.group_bytes);
    const HugeBuffer scratch(scratch_bytes(table_, kGroups));
    const std::vector<const uint8_t*> inputs(tokens_, input.data());
    const std::vector<uint8_t*> outputs(tokens_, output.data());
    table_.gate_up({.weights = weights_ + first * kPairBytes,
                    .groups = kGroups,
                    .pairs = last - first,
                    .tokens = tokens_,
                    .input = inputs.data(),
                    .output = outputs.data(),
                    .policy = policy_,
                    .scratch = scratch.data()});
  }

  const KernelTable& table_;
  const uint8_t* const weights_;
  const int pairs_;
  const int tokens_;
  const CallPolicy policy_;
};

struct Candidate {
  CallPolicy policy;
  double best = 1e9;  // seconds
};

class Trial {
 public:
  Trial(ThreadPool& pool, const KernelTable& table, size_t bytes) : pool_(pool), table_(table), weights_(pool, bytes) {
    Touch touch(pool, weights_.buffer);
    time_job(pool, touch);
  }

  // The first candidate, or one that is clearly faster. In turns, so that a slow moment hits all of them.
  Candidate choose(std::vector<Candidate> candidates, int tokens, double seconds) {
    double spent = 0;
    for (int round = 0; round < kMinRounds || spent < seconds; ++round) {
      for (Candidate& candidate : candidates) {
        Pass pass(pool_, table_, weights_, tokens, candidate.policy);
        const double taken = time_job(pool_, pass);
        candidate.best = std::min(candidate.best, taken);
        spent += taken;
      }
    }
    const auto fastest = std::min_element(candidates.begin(), candidates.end(),
                                          [](const Candidate& a, const Candidate& b) { return a.best < b.best; });
    return fastest->best < kClearly * candidates[0].best ? *fastest : candidates[0];
  }

  // The fewest tokens from which tiles are at least as fast for all numbers that are tried. Tiles go first: they are the
  // better guess where a neighbour on the core disturbs the measurement.
  int tiles_from(CallPolicy policy, double seconds) {
    int from = kMaxTokens + 1;
    for (const int tokens : kTileTokens) {
      CallPolicy vectors = policy, tiles = policy;
      vectors.tiles_from = kMaxTokens + 1;
      tiles.tiles_from = 1;
      if (choose({{tiles}, {vectors}}, tokens, seconds / std::size(kTileTokens)).policy.tiles_from != 1) break;
      from = tokens;
    }
    return from;
  }

 private:
  ThreadPool& pool_;
  const KernelTable& table_;
  Weights weights_;
};

}  // namespace

Tuning measure_tuning(ThreadPool& pool, const KernelTable& table, double seconds, size_t bytes) {
  Trial trial(pool, table, bytes);
  CallPolicy policy = table.tuning.policy;
  std::vector<Candidate> one{{policy}}, few{{policy}};
  for (const int prefetch : {0, 4096, 9216}) {
    for (const int streams : {1, 2, 4}) {
      one.push_back({{.streams = streams, .prefetch_one = prefetch, .tiles_from = policy.tiles_from}});
    }
  }
  for (const int prefetch : {0, 2048, 4096, 9216, 16384}) {
    few.push_back({{.prefetch_many = prefetch, .tiles_from = policy.tiles_from}});
  }
  const Candidate best_one = trial.choose(one, 1, 0.45 * seconds);
  policy.streams = best_one.policy.streams;
  policy.prefetch_one = best_one.policy.prefetch_one;
  policy.prefetch_many = trial.choose(few, kFewTokens, 0.35 * seconds).policy.prefetch_many;
  if (table.has_tiles) policy.tiles_from = trial.tiles_from(policy, 0.6 * seconds);
  const Candidate many = trial.choose({{policy}}, kManyTokens, 0.2 * seconds);
  const float token_cost = float(many.best / kManyTokens / best_one.best);
  return {policy, std::clamp(token_cost, kLeastCost, kMostCost)};
}

}  // namespace k2
