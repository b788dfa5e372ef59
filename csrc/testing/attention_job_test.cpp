// Attention on the portable kernels against float64, and the same bits for every number of workers, every batch and
// every cut of a prompt: attention_job_test SEED CASES
#include <string>

#include "kernels/attention_list.h"
#include "testing/attention_case.h"

namespace k2 {
namespace {

using Random = AttentionCase::Random;

// Four sums of n products follow each other, with an error of about sqrt(n) * 2^-24 (n < 600 but behind long contexts,
// where most weights are tiny); an error of scores of a size of about 40 changes weights by 40 times as much. Relative
// to the largest number of a head.
constexpr double kTolerance = 4 * 24 * 40 * 0x1p-24;

void equals_float64(const AttentionCase& attention, const std::vector<float>& got) {
  const std::vector<double> expected = attention.expected();
  const size_t value = size_t(attention.sizes.value);
  for (size_t head = 0; head < got.size(); head += value) {
    double largest = 0;
    for (size_t v = 0; v < value; ++v) largest = std::max(largest, std::fabs(expected[head + v]));
    for (size_t v = 0; v < value; ++v) {
      K2_EXPECT(std::isnan(got[head + v]) == std::isnan(expected[head + v]));
      if (std::isnan(got[head + v])) continue;
      K2_EXPECT(std::fabs(got[head + v] - expected[head + v]) <= kTolerance * (largest + 1));
    }
  }
}

void same_rows(const AttentionCase& attention, const AttentionSequence& rows, const std::vector<float>& part,
               const std::vector<float>& whole) {
  const size_t width = size_t(attention.sizes.heads) * attention.sizes.value;
  for (size_t i = size_t(rows.first_row) * width; i < size_t(rows.first_row + rows.rows) * width; ++i) {
    K2_EXPECT(part[i] == whole[i]);
  }
}

// Each sequence alone, and each of its tokens alone.
void does_not_depend_on_company(AttentionCase attention, ThreadPool& pool, AttentionWorkspace& workspace,
                                const std::vector<float>& whole) {
  const AttentionTable& table = find_attention("portable");
  for (const AttentionSequence s : std::vector<AttentionSequence>(attention.sequences)) {
    attention.sequences = {s};
    same_rows(attention, s, attention.run(table, pool, workspace), whole);
    const AttentionSequence last{s.first_row + s.rows - 1, 1, s.cached + s.rows - 1, s.first_page};
    attention.sequences = {last};
    same_rows(attention, last, attention.run(table, pool, workspace), whole);
  }
}

void bad_arguments_are_refused(Random& random) {
  ThreadPool pool(1);
  AttentionWorkspace workspace;
  const AttentionCase good(random);
  auto refused = [&](AttentionCase attention) {
    try {
      attention.run(find_attention("portable"), pool, workspace);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  };
  K2_EXPECT(!refused(good));
  AttentionCase bad = good;
  bad.sequences[0].rows = 0;
  K2_EXPECT(refused(bad));
  bad = good;
  bad.sequences.back().first_row = bad.tokens;
  K2_EXPECT(refused(bad));
  bad = good;
  bad.sequences.back().cached += bad.page_tokens * int64_t(bad.table.size());
  K2_EXPECT(refused(bad));
  bad = good;
  bad.table[size_t(bad.sequences[0].first_page)] = int64_t(bad.table.size());
  K2_EXPECT(refused(bad));
  bad.table[size_t(bad.sequences[0].first_page)] = -1;
  K2_EXPECT(refused(bad));
}

// Ranges cover the keys without gap or overlap, grow with the position, and stay small beside what lies before them.
void ranges_grow_slowly() {
  const MlaSizes sizes = mla_sizes(64, 128, 64, 128, 512);
  const AttentionPlan plan = plan_attention(sizes, {{0, 1, 262143, 0}});
  const std::vector<int64_t>& starts = plan.range_starts;
  K2_EXPECT(starts.front() == 0 && starts.back() >= 262144 && starts.size() < 240);
  for (size_t i = 1; i < starts.size(); ++i) {
    const int64_t size = starts[i] - starts[i - 1];
    K2_EXPECT(size % kBlockKeys == 0 && (size == kBlockKeys || size * 32 <= starts[i - 1]));
  }
  const Slab& slab = plan.slabs.at(0);
  K2_EXPECT(slab.groups.size() == 2 && slab.waves.size() == 1);
  K2_EXPECT(slab.waves[0].units.size() == 2 * (starts.size() - 1));
}

void memory_is_bounded() {
  const MlaSizes sizes = mla_sizes(64, 128, 64, 128, 512);
  const AttentionPlan plan = plan_attention(sizes, {{0, 300, 32768, 0}, {300, 1, 200000, 600}});
  K2_EXPECT(plan.slabs.size() == 3 && plan.max_tokens == 128 && plan.max_groups == 256);
  K2_EXPECT(plan.max_partials * partial_numbers(sizes) * sizeof(float) <= size_t(64) << 20);
  for (const Slab& slab : plan.slabs) {
    int group = 0;
    for (const Wave& wave : slab.waves) {
      K2_EXPECT(wave.first_group == group && wave.last_group > group);
      group = wave.last_group;
    }
    K2_EXPECT(group == int(slab.groups.size()));
  }
}

}  // namespace
}  // namespace k2

int main(int argc, char** argv) {
  using namespace k2;
  K2_EXPECT(argc == 3);
  Random random(std::stoull(argv[1]));
  ranges_grow_slowly();
  memory_is_bounded();
  bad_arguments_are_refused(random);
  const AttentionTable& table = find_attention("portable");
  ThreadPool pools[] = {ThreadPool(1), ThreadPool(2), ThreadPool(5)};
  AttentionWorkspace workspaces[3];
  const int cases = std::stoi(argv[2]);
  for (int i = 0; i < cases; ++i) {
    // A few cases, as under a sanitizer, do without the long one.
    const AttentionCase attention(random, i == 5       ? AttentionCase::kLongContext
                                          : i % 8 == 1 ? AttentionCase::kPrompt
                                                       : AttentionCase::kAny);
    const std::vector<float> whole = attention.run(table, pools[0], workspaces[0]);
    equals_float64(attention, whole);
    for (int p = 1; p < 3; ++p) {
      const std::vector<float> other = attention.run(table, pools[p], workspaces[p]);
      for (const AttentionSequence& s : attention.sequences) same_rows(attention, s, other, whole);
    }
    does_not_depend_on_company(attention, pools[1], workspaces[1], whole);
  }
  std::puts("ok");
}
