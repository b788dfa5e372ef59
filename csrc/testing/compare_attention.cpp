// Compares two attention tables bit for bit on random calls: compare_attention REFERENCE OTHER SEED CASES
//
// The CPU is not asked whether it supports them: a table may be built on a model of its instructions.
#include <string>

#include "kernels/attention_list.h"
#include "testing/attention_case.h"

int main(int argc, char** argv) {
  using namespace k2;
  K2_EXPECT(argc == 5);
  const AttentionTable& a = find_attention(argv[1]);
  const AttentionTable& b = find_attention(argv[2]);
  K2_EXPECT(a.name == std::string(argv[1]) && b.name == std::string(argv[2]));
  AttentionCase::Random random(std::stoull(argv[3]));
  const int cases = std::stoi(argv[4]);
  ThreadPool pool(2);
  AttentionWorkspace workspaces[2];
  for (int i = 0; i < cases; ++i) {
    const AttentionCase attention(random, i % 8 == 1 ? AttentionCase::kPrompt : AttentionCase::kAny);
    const std::vector<float> x = attention.run(a, pool, workspaces[0]), y = attention.run(b, pool, workspaces[1]);
    for (size_t k = 0; k < x.size(); ++k) K2_EXPECT(std::bit_cast<uint32_t>(x[k]) == std::bit_cast<uint32_t>(y[k]));
  }
  std::printf("%d cases are equal\n", cases);
}
