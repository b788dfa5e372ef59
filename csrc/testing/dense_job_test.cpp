// Dense products with 1 to 7 workers, on one node and on several, on the portable kernels, for the sanitizers; numerics
// are tested from Python.
#include "dense/dense_job.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/first_touch.h"
#include "kernels/dense_list.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937;

// Rows of the second matrix. With few tokens so many that a lone worker takes several row blocks at a time.
constexpr int kMostRows = 37 * kDenseRows;
int second_rows(int tokens) { return tokens <= 7 ? kMostRows : 5 * kDenseRows; }

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
  const std::vector<int> anywhere(size_t(pool.map().nodes()), kAnyNode);
  const int rows = second_rows(tokens);
  DenseMatrix first(64, kInputs, int8, pool.map(), anywhere), second(rows, kInputs, int8, pool.map(), anywhere);
  for (DenseMatrix* matrix : {&first, &second}) {
    PackJob pack(pool, *matrix, {weights.data(), false}, 0, matrix->blocks());
    run(pool, pack);
  }
  std::vector<float> out(size_t(tokens) * size_t(64 + rows));
  std::vector<uint8_t> scratch;
  DenseJob job(pool, find_dense_table("portable"),
               {{&first, out.data()}, {&second, out.data() + size_t(tokens) * 64}}, {x.data(), tokens}, scratch);
  run(pool, job);
  return out;
}

// Workers on one node, and on several.
std::vector<PoolLayout> layouts() {
  std::vector<PoolLayout> layouts;
  for (const std::vector<int>& nodes : std::vector<std::vector<int>>{{1}, {2}, {3}, {5}, {1, 1}, {2, 1, 4}}) {
    PoolLayout layout;
    for (const int workers : nodes) layout.push_back({workers, kAnyNode, {}});
    layouts.push_back(layout);
  }
  return layouts;
}

void results_do_not_depend_on_workers() {
  Random random(11);
  const std::vector<float> weights = random_floats(random, kMostRows * 96);
  for (const bool int8 : {false, true}) {
    for (const int tokens : {0, 1, 7, 133}) {
      std::vector<float> x = random_floats(random, size_t(tokens) * 96);
      if (tokens > 1) x[96] = NAN;
      std::vector<float> expected;
      for (const PoolLayout& layout : layouts()) {
        ThreadPool pool(layout);
        const std::vector<float> got = compute(pool, int8, weights, x);
        if (expected.empty()) expected = got;
        K2_EXPECT(got.empty() || std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0);
      }
      K2_EXPECT(tokens < 2 || (std::isnan(expected[64]) && !std::isnan(expected[0])));
    }
  }
}

void packing_refuses_what_int8_cannot_hold() {
  ThreadPool pool(2);
  DenseMatrix matrix(64, 32, true, pool.map(), {kAnyNode});
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

size_t resident_pages(const HugeBuffer& buffer) {
  std::vector<unsigned char> pages(buffer.bytes() / 4096);
  K2_EXPECT(mincore(buffer.data(), buffer.bytes(), pages.data()) == 0);
  size_t count = 0;
  for (const unsigned char page : pages) count += page & 1;
  return count;
}

// No such NUMA node: the system refuses, and the workers of the node write to its part.
void memory_that_cannot_be_bound_is_touched_by_its_node() {
  ThreadPool pool(PoolLayout{{1, 90000, {}}, {2, kAnyNode, {}}});
  const DenseMatrix matrix(192, 4096, false, pool.map(), {90000, kAnyNode});
  K2_EXPECT(!matrix.bound() && matrix.buffers().size() == 2);
  for (const HugeBuffer* buffer : matrix.buffers()) K2_EXPECT(resident_pages(*buffer) == 0);
  first_touch(pool, matrix.buffers());
  K2_EXPECT(resident_pages(*matrix.buffers()[0]) == matrix.buffers()[0]->bytes() / 4096);
  K2_EXPECT(resident_pages(*matrix.buffers()[1]) == 0);
}

}  // namespace
}  // namespace k2

int main() {
  k2::memory_that_cannot_be_bound_is_touched_by_its_node();
  k2::results_do_not_depend_on_workers();
  k2::packing_refuses_what_int8_cannot_hold();
  std::printf("ok\n");
}
