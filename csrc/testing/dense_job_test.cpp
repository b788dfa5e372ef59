// Dense products with 1, 2, 3 and 5 workers on the portable kernels, for the sanitizers; numerics are tested from Python.
#include "dense/dense_job.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/dense_list.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937;

std::vector<float> random_floats(Random& random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& x : out) x = normal(random);
  return out;
}

void run(ThreadPool& pool, Job& job) {
  pool.submit(job);
  K2_EXPECT(pool.wait(job));
  job.rethrow();
}

// Two matrices over the same rows, packed and computed by the pool; both outputs, one after the other.
std::vector<float> compute(ThreadPool& pool, bool int8, const std::vector<float>& weights, const std::vector<float>& x) {
  constexpr int kInputs = 96;
  const int tokens = int(x.size()) / kInputs;
  DenseMatrix first(64, kInputs, int8), second(160, kInputs, int8);
  for (DenseMatrix* matrix : {&first, &second}) {
    PackJob pack(pool, *matrix, {weights.data(), false}, 0, matrix->blocks());
    run(pool, pack);
  }
  std::vector<float> out(size_t(tokens) * (64 + 160));
  std::vector<uint8_t> scratch;
  DenseJob job(pool, find_dense_table("portable"),
               {{&first, out.data()}, {&second, out.data() + size_t(tokens) * 64}}, {x.data(), tokens}, scratch);
  run(pool, job);
  return out;
}

void results_do_not_depend_on_workers() {
  Random random(11);
  const std::vector<float> weights = random_floats(random, 160 * 96);
  for (const bool int8 : {false, true}) {
    for (const int tokens : {0, 1, 7, 133}) {
      std::vector<float> x = random_floats(random, size_t(tokens) * 96);
      if (tokens > 1) x[96] = NAN;
      std::vector<float> expected;
      for (const int workers : {1, 2, 3, 5}) {
        ThreadPool pool(workers);
        const std::vector<float> got = compute(pool, int8, weights, x);
        if (workers == 1) expected = got;
        K2_EXPECT(got.empty() || std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0);
      }
      K2_EXPECT(tokens < 2 || (std::isnan(expected[64]) && !std::isnan(expected[0])));
    }
  }
}

void packing_refuses_what_int8_cannot_hold() {
  ThreadPool pool(2);
  DenseMatrix matrix(64, 32, true);
  std::vector<float> weights(64 * 32, 1.0f);
  weights[40 * 32] = INFINITY;
  PackJob pack(pool, matrix, {weights.data(), false}, 0, 2);
  bool refused = false;
  try {
    run(pool, pack);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  K2_EXPECT(refused);
}

}  // namespace
}  // namespace k2

int main() {
  k2::results_do_not_depend_on_workers();
  k2::packing_refuses_what_int8_cannot_hold();
  std::printf("ok\n");
}
