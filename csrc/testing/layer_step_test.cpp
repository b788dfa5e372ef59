// Whole layers on the portable kernels, dense ones and ones with experts: the same bits with 1 and 3 workers and for a
// row alone, and nothing left behind by a step that is given up at any of its waits. Python's tests compare them with
// their parts. layer_step_test SEED
#include "step/layer_step.h"

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937_64;

constexpr int kHidden = 64, kInner = 96, kExperts = 5, kChosen = 2, kPageTokens = 4, kPages = 6;
const MlaSizes kSizes = mla_sizes(2, 16, 8, 16, 24);

struct GivenUp {};

std::vector<float> normal(Random& random, size_t n, float scale = 1) {
  std::normal_distribution<float> draw(0, scale);
  std::vector<float> out(n);
  for (float& x : out) x = draw(random);
  return out;
}

class TestLayer {
 public:
  TestLayer(uint64_t seed, int workers, bool with_experts, bool int8)
      : runtime_(std::make_shared<Runtime>("portable", kExact, workers)),
        attention_(runtime_, kSizes, 0.3f) {
    Random random(seed);
    auto matrix = [&](int rows, int inputs, bool as_int8) -> const DenseMatrix* {
      matrices_.push_back(std::make_unique<DenseMatrix>(rows, inputs, as_int8, pool().map(), std::vector{kAnyNode}));
      const std::vector<float> values = normal(random, size_t(rows) * inputs, 0.2f);
      PackJob pack(pool(), *matrices_.back(), {values.data(), false}, 0, rows / 32);
      pool().submit(pack);
      K2_EXPECT(pool().wait(pack));
      return matrices_.back().get();
    };
    auto numbers = [&](size_t n) {
      numbers_.push_back(std::make_unique<std::vector<float>>(normal(random, n)));
      return numbers_.back()->data();
    };
    auto norm = [&](size_t n) { return NormWeight{numbers(n), false, 1e-5f}; };
    parts_ = {.input_norm = norm(kHidden),
              .post_norm = norm(kHidden),
              .attention = {.q_a = matrix(32, kHidden, int8),
                            .kv_a = matrix(32, kHidden, false),  // of two kinds: two jobs over the same rows
                            .q_b = matrix(64, 32, int8),
                            .o = matrix(kHidden, 32, int8),
                            .q_a_norm = norm(32),
                            .kv_a_norm = norm(24),
                            .kv_b = numbers(size_t(2) * 32 * 24),
                            .kv_b_bf16 = false},
              .mlp = {matrix(kInner, kHidden, int8), matrix(kInner, kHidden, int8), matrix(kHidden, kInner, int8)},
              .router = {},
              .experts = nullptr};
    if (!with_experts) return;
    parts_.router = {matrix(32, kHidden, false), {numbers(kExperts), kExperts, kChosen, true, 2.5f}};
    experts_ = std::make_unique<Layer>(runtime_, LayerShape{kHidden, kInner, kExperts, kChosen});
    parts_.experts = experts_.get();
    for (int e = 0; e < kExperts; ++e) {
      const Words gate(random, kInner, kHidden), up(random, kInner, kHidden), down(random, kHidden, kInner);
      experts_->experts().pack(e, gate.matrix(), up.matrix(), down.matrix());
    }
  }

  // Two sequences' rows, or one of them; `give_up` at so many waits.
  std::vector<float> run(uint64_t seed, int first = 0, int rows = 3, int give_up = -1) {
    Random random(seed);
    std::vector<float> x = normal(random, 3 * kHidden), cos = normal(random, 3 * 4), sin = normal(random, 3 * 4);
    std::vector<float> pages = normal(random, kPages * kPageTokens * size_t(kSizes.latent));
    const std::vector<int64_t> table{5, 0, 3, 1};
    const std::vector<AttentionSequence> all{{0, 1, 6, 0}, {1, 1, 2, 2}, {2, 1, 3, 2}};
    std::vector<AttentionSequence> sequences;
    for (int row = first; row < first + rows; ++row) {
      sequences.push_back(all[size_t(row)]);
      sequences.back().first_row -= first;
    }
    std::vector<int32_t> ids(size_t(rows) * kChosen);
    int waits = 0;
    const Wait wait = [&](Job& job) {
      if (waits++ == give_up) {
        job.cancel();
        pool().finish(job);
        throw GivenUp();
      }
      K2_EXPECT(pool().wait(job));
      job.rethrow();
    };
    x = {x.begin() + first * kHidden, x.begin() + (first + rows) * kHidden};
    const LatentPages where{pages.data(), false, kPages, kPageTokens, table.data(), int64_t(table.size())};
    LayerStep(*runtime_, attention_, parts_, memory_, wait)
        .run({.x = x.data(),
              .rows = rows,
              .cos = cos.data() + first * 4,
              .sin = sin.data() + first * 4,
              .pages = where,
              .pages_out = pages.data(),
              .sequences = sequences,
              .ids = ids.data()});
    return x;
  }

  // Whether a step that is given up at its `at`th wait ends early; the memory that it used may be used again.
  bool given_up(uint64_t seed, int at) {
    try {
      run(seed, 0, 3, at);
    } catch (const GivenUp&) {
      return true;
    }
    return false;
  }

 private:
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

  ThreadPool& pool() { return runtime_->pool; }

  std::shared_ptr<Runtime> runtime_;
  LatentAttention attention_;
  std::vector<std::unique_ptr<DenseMatrix>> matrices_;
  std::vector<std::unique_ptr<std::vector<float>>> numbers_;
  std::unique_ptr<Layer> experts_;
  LayerParts parts_;
  StepMemory memory_;
};

void steps_are_right_whatever_came_before(uint64_t seed, bool with_experts, bool int8) {
  TestLayer one(seed, 1, with_experts, int8), three(seed, 3, with_experts, int8);
  const std::vector<float> expected = one.run(seed);
  int waits = 0;
  while (three.given_up(seed, waits)) {
    K2_EXPECT(three.run(seed) == expected);
    ++waits;
  }
  K2_EXPECT(waits >= 5);
  const std::vector<float> alone = three.run(seed, 0, 1);  // the other two rows are of one sequence
  K2_EXPECT(alone == std::vector<float>(expected.begin(), expected.begin() + kHidden));
}

}  // namespace
}  // namespace k2

int main(int argc, char** argv) {
  K2_EXPECT(argc == 2);
  const uint64_t seed = std::stoull(argv[1]);
  for (const bool with_experts : {false, true}) {
    for (const bool int8 : {false, true}) k2::steps_are_right_whatever_came_before(seed, with_experts, int8);
  }
  std::puts("ok");
}
