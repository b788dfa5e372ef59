// A layer's computation with 1, 2, 3 and 5 workers on the portable kernels, for the sanitizers; numerics are tested
// from Python.
#include "moe/moe_job.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "core/error.h"
#include "kernels/kernel_list.h"
#include "moe/layer.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937;

struct Words {
  Words(Random& random, int rows, int inputs) : rows(rows), inputs(inputs) {
    for (int i = 0; i < rows * inputs / 8; ++i) words.push_back(uint32_t(random()));
    for (int i = 0; i < rows * inputs / kGroup; ++i) scales.push_back(uint16_t(0x3c00 + random() % 256));
  }
  PackedMatrix matrix() const { return {words.data(), scales.data(), rows, inputs}; }

  int rows, inputs;
  std::vector<uint32_t> words;
  std::vector<uint16_t> scales;
};

struct Batch {
  Batch(Random& random, const LayerShape& shape, int tokens) : tokens(tokens) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < tokens * shape.hidden; ++i) hidden.push_back(normal(random));
    for (int i = 0; i < tokens * shape.experts_per_token; ++i) {
      const int expert = int(random() % unsigned(shape.experts));  // a token may name one twice
      ids.push_back(i % 16 == 7 ? kElsewhere : expert);
      weights.push_back(normal(random));
    }
  }
  MoeInput input() const { return {hidden.data(), false, ids.data(), weights.data(), tokens}; }

  int tokens;
  std::vector<float> hidden, weights;
  std::vector<int32_t> ids;
};

std::vector<float> compute(Layer& layer, const Batch& batch) {
  std::vector<float> out(size_t(batch.tokens) * layer.experts().shape().hidden);
  const std::shared_ptr<MoeJob> job = layer.start(batch.input());
  K2_EXPECT(layer.runtime().pool.wait(*job));
  job->rethrow();
  job->copy_output(out.data());
  return out;
}

// The same with the caller's memory as the output.
std::vector<float> compute_in_place(Layer& layer, const Batch& batch) {
  std::vector<float> out(size_t(batch.tokens) * layer.experts().shape().hidden, -1.0f);
  const std::shared_ptr<MoeJob> job = layer.start(batch.input(), out.data());
  K2_EXPECT(layer.runtime().pool.wait(*job));
  job->rethrow();
  return out;
}

// `workers` workers on `nodes` virtual nodes.
PoolLayout spread(int workers, int nodes) {
  PoolLayout layout;
  for (int node = 0; node < nodes; ++node) {
    layout.push_back({workers * (node + 1) / nodes - workers * node / nodes, kAnyNode, {}});
  }
  return layout;
}

std::vector<std::vector<float>> compute_all(const LayerShape& shape, const std::vector<Words>& weights,
                                            const std::vector<Batch>& batches, const PoolLayout& layout) {
  Layer layer(std::make_shared<Runtime>("portable", kExact, layout), shape);
  for (int e = 0; e < shape.experts; ++e) {
    layer.experts().pack(e, weights[3 * e].matrix(), weights[3 * e + 1].matrix(), weights[3 * e + 2].matrix());
  }
  std::vector<std::vector<float>> results;
  for (const Batch& batch : batches) results.push_back(compute_in_place(layer, batch));
  const std::unique_ptr<Workspace> used = layer.runtime().workspaces.take(int(layout.size()));
  K2_EXPECT(used->hidden.bytes() == 0 && used->parts[0].output.bytes() == 0);  // nothing was copied
  for (size_t i = 0; i < batches.size(); ++i) K2_EXPECT(compute(layer, batches[i]) == results[i]);
  return results;
}

// Partial sums are rounded apart from each other: a few units in the last place of the row's largest values.
void expect_close(const std::vector<float>& got, const std::vector<float>& expected, int row_size) {
  for (size_t row = 0; row < got.size(); row += size_t(row_size)) {
    double difference = 0, size = 0;
    for (size_t i = row; i < row + size_t(row_size); ++i) {
      difference += std::pow(double(got[i]) - expected[i], 2);
      size += std::pow(double(expected[i]), 2);
    }
    K2_EXPECT(difference <= 1e-11 * size);
  }
}

void results_depend_on_the_nodes_by_rounding_and_not_on_the_workers() {
  Random random(7);
  const LayerShape shape{96, 64, 5, 3};
  std::vector<Words> weights;
  for (int e = 0; e < shape.experts; ++e) {
    weights.emplace_back(random, shape.intermediate, shape.hidden);
    weights.emplace_back(random, shape.intermediate, shape.hidden);
    weights.emplace_back(random, shape.hidden, shape.intermediate);
  }
  std::vector<Batch> batches;
  for (const int tokens : {0, 1, 13, 1100}) batches.emplace_back(random, shape, tokens);
  std::vector<std::vector<float>> on_one_node;
  for (const int nodes : {1, 2, 3}) {  // the third has no channel
    std::vector<std::vector<float>> expected;
    for (const int workers : {nodes, nodes + 1, 5}) {
      const std::vector<std::vector<float>> results = compute_all(shape, weights, batches, spread(workers, nodes));
      if (expected.empty()) expected = results;
      K2_EXPECT(results == expected);  // no NaN here: equal numbers are equal bits, but for the sign of zero
    }
    if (nodes == 1) on_one_node = expected;
    for (size_t i = 0; i < expected.size(); ++i) expect_close(expected[i], on_one_node[i], shape.hidden);
    K2_EXPECT((expected == on_one_node) == (nodes == 1));  // the slices did add their own sums
  }
}

void a_layer_and_its_pool_have_the_same_nodes() {
  Random random(12);
  const LayerShape shape{64, 64, 1, 1};
  Runtime runtime("portable", kExact, spread(2, 2));
  const ExpertLayer layer(shape);
  const Batch batch(random, shape, 0);
  bool refused = false;
  try {
    MoeJob job(runtime.pool, runtime.table, runtime.tuning(), layer, runtime.workspaces, batch.input());
  } catch (const ArgumentError&) {
    refused = true;
  }
  K2_EXPECT(refused);
}

void closing_with_work_in_flight_ends_it() {
  Random random(8);
  const LayerShape shape{64, 64, 2, 2};
  for (int round = 0; round < 10; ++round) {
    auto runtime = std::make_shared<Runtime>("portable", kExact, spread(2, 1 + round % 2));
    Layer layer(runtime, shape);
    for (int e = 0; e < shape.experts; ++e) {
      const Words gate(random, 64, 64), up(random, 64, 64), down(random, 64, 64);
      layer.experts().pack(e, gate.matrix(), up.matrix(), down.matrix());
    }
    const Batch batch(random, shape, 300);
    layer.submit(0, batch.input());
    layer.submit(1, batch.input());
  }
}

// Two threads submit to one slot and wait for it, as fast as they can: one of them gets it each time, and a job stays
// alive until it has run.
void a_slot_has_one_owner() {
  Random random(10);
  const LayerShape shape{64, 64, 2, 2};
  Layer layer(std::make_shared<Runtime>("portable", kExact, 2), shape);
  for (int e = 0; e < shape.experts; ++e) {
    const Words gate(random, 64, 64), up(random, 64, 64), down(random, 64, 64);
    layer.experts().pack(e, gate.matrix(), up.matrix(), down.matrix());
  }
  const Batch batches[] = {{random, shape, 1}, {random, shape, 3}};
  std::vector<float> expected[2];
  for (int i = 0; i < 2; ++i) expected[i] = compute(layer, batches[i]);
  std::atomic<int> submitted{0}, refused{0};
  auto use = [&](const Batch& batch) {
    for (int round = 0; round < 200; ++round) {
      try {
        layer.submit(0, batch.input());
        submitted.fetch_add(1);
      } catch (const ArgumentError&) {
        refused.fetch_add(1);
      }
      try {
        const std::shared_ptr<MoeJob> job = layer.in_flight(0);  // perhaps the other thread's
        K2_EXPECT(layer.runtime().pool.wait(*job));
        layer.release(0, job);
        const int which = job->tokens() == batches[0].tokens ? 0 : 1;
        std::vector<float> out(expected[which].size());
        job->copy_output(out.data());
        K2_EXPECT(out == expected[which]);
      } catch (const ArgumentError&) {  // it was free
      }
    }
  };
  std::thread other([&] { use(batches[1]); });
  use(batches[0]);
  other.join();
  K2_EXPECT(submitted.load() > 0 && submitted.load() + refused.load() == 400);
  for (int slot : {-1, 2}) {
    bool thrown = false;
    try {
      layer.submit(slot, batches[0].input());
    } catch (const ArgumentError&) {
      thrown = true;
    }
    K2_EXPECT(thrown);
  }
}

void a_failed_submit_leaves_the_slot_free() {
  Random random(11);
  const LayerShape shape{64, 64, 2, 2};
  Layer layer(std::make_shared<Runtime>("portable", kExact, 1), shape);
  const Batch batch(random, shape, 1);
  for (int round = 0; round < 2; ++round) {
    bool thrown = false;
    try {
      layer.submit(1, batch.input());  // no expert was loaded
    } catch (const EngineError&) {
      thrown = true;
    }
    K2_EXPECT(thrown);
  }
}

// What is kept after a use of so many bytes by each of the parts.
size_t kept(int parts, size_t bytes) {
  WorkspaceStore store;
  std::unique_ptr<Workspace> workspace = store.take(parts);
  for (PartMemory& part : workspace->parts) reserve(part.packed, bytes);
  store.give(std::move(workspace));
  return store.take(parts)->bytes();
}

void scratch_is_kept_up_to_a_limit_per_node() {
  constexpr size_t kMiB = size_t(1) << 20;
  for (const int parts : {1, 2, 3}) {
    K2_EXPECT(kept(parts, 60 * kMiB) == 60 * kMiB * parts);
    K2_EXPECT(kept(parts, 70 * kMiB) == 0);
  }
}

template <class Call>
bool is_engine_error(Call call) {
  try {
    call();
  } catch (const EngineError&) {
    return true;
  }
  return false;
}

// The locks are nearly always held by the other threads, and with them in the child for ever.
void a_forked_child_computes_nothing_and_ends() {
  Random random(13);
  const LayerShape shape{64, 64, 2, 2};
  auto runtime = std::make_shared<Runtime>("portable", kExact, 2);
  std::optional<Layer> layer(std::in_place, runtime, shape);
  for (int e = 0; e < shape.experts; ++e) {
    const Words gate(random, 64, 64), up(random, 64, 64), down(random, 64, 64);
    layer->experts().pack(e, gate.matrix(), up.matrix(), down.matrix());
  }
  const Batch batch(random, shape, 300);
  std::atomic<bool> ends{false};
  std::thread taking([&] { while (!ends.load()) runtime->workspaces.give(runtime->workspaces.take(1)); });
  std::thread releasing([&] { while (!ends.load()) layer->release(1, nullptr); });
  for (int round = 0; round < 10; ++round) {
    layer->submit(0, batch.input());
    const pid_t child = fork();
    if (child == 0) {
      alarm(30);
      K2_EXPECT(is_engine_error([&] { layer->start(batch.input()); }));
      K2_EXPECT(is_engine_error([&] { layer->submit(1, batch.input()); }));
      K2_EXPECT(is_engine_error([&] { layer->in_flight(0); }));
      layer.reset();
      _exit(0);
    }
    const std::shared_ptr<MoeJob> job = layer->in_flight(0);
    K2_EXPECT(runtime->pool.wait(*job));
    layer->release(0, job);
    int status = -1;
    K2_EXPECT(waitpid(child, &status, 0) == child && status == 0);
  }
  ends.store(true);
  taking.join();
  releasing.join();
}

void work_is_cut_without_gap_or_overlap() {
  Random random(9);
  for (int round = 0; round < 200; ++round) {
    RoutedChunk chunk{};
    const int experts = int(random() % 6), units = 1 + int(random() % 9), workers = 1 + int(random() % 9);
    for (int e = 0; e < experts; ++e) chunk.experts.push_back({e, 0, 1 + int(random() % 40)});
    int before = 0;
    const float token_cost = 0.01f * float(random() % 200);
    const auto cut_at = [&](int worker) { return cut_work(chunk, units, token_cost, worker, workers); };
    K2_EXPECT(cut_at(0).index == 0 && cut_at(0).unit == 0);
    for (int worker = 1; worker <= workers; ++worker) {
      const WorkCut cut = cut_at(worker);
      const int at = cut.index * units + cut.unit;
      K2_EXPECT(at >= before && cut.unit < units);
      before = at;
    }
    K2_EXPECT(before == experts * units);
  }
}

}  // namespace
}  // namespace k2

int main(int argc, char**) {
  k2::work_is_cut_without_gap_or_overlap();
  k2::results_depend_on_the_nodes_by_rounding_and_not_on_the_workers();
  k2::a_layer_and_its_pool_have_the_same_nodes();
  k2::closing_with_work_in_flight_ends_it();
  k2::a_slot_has_one_owner();
  k2::a_failed_submit_leaves_the_slot_free();
  k2::scratch_is_kept_up_to_a_limit_per_node();
  if (argc == 1) k2::a_forked_child_computes_nothing_and_ends();  // any argument leaves it out: tools cannot follow a fork
  std::puts("ok");
}
