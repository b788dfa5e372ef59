// Compares two dense tables bit for bit on random work of ragged sizes: compare_dense REFERENCE OTHER SEED CASES
//
// The CPU is not asked whether it supports them: a table may be built on a model of its instructions.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/huge_buffer.h"
#include "kernels/dense_list.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937_64;

int pick(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

const DenseTable& table_named(const std::string& name) {
  const DenseTable& table = find_dense_table(name);
  if (table.name == name) return table;
  std::fprintf(stderr, "no table %s in this build\n", name.c_str());
  std::exit(2);
}

bool same_float(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)); }

uint16_t random_bf16(Random& random) {
  std::normal_distribution<float> normal;
  const float special[] = {0.0f, -0.0f, 1.0e-40f, 3.0e38f, std::numeric_limits<float>::infinity(), NAN};
  const float value = pick(random, 0, 999) == 0 ? special[pick(random, 0, 5)] : normal(random);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return uint16_t(bits >> 16);
}

// Rows of outputs with gaps between them, as columns of a wider matrix have.
struct Work {
  Work(Random& random, int tokens)
      : groups(pick(random, 1, 21)), blocks(pick(random, 1, 9)), tokens(tokens), gap(pick(random, 0, 40)) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < tokens * inputs(); ++i) {
      input.push_back(pick(random, 0, 999) == 0 ? std::ldexp(normal(random), pick(random, -140, 120)) : normal(random));
    }
  }
  int inputs() const { return groups * kDenseGroup; }
  int output_stride() const { return blocks * kDenseRows + gap; }

  int groups, blocks, tokens, gap;
  std::vector<float> input;
};

// One table's result for the work, its rows apart by the gap; what lies between them stays as it is. What is asked for
// ahead changes nothing.
std::vector<float> compute(Random& random, const Work& work, const DenseTable& table, bool int8, const uint8_t* weights,
                           const std::vector<uint8_t>& input) {
  std::vector<float> out(size_t(work.tokens) * work.output_stride(), 0.25f);
  (int8 ? table.int8 : table.bf16)(
      {weights, work.groups, work.blocks, work.tokens, input.data(), out.data(), work.output_stride(),
       4096 * pick(random, 0, 2)});
  for (int t = 0; t < work.tokens; ++t) {
    for (int i = work.blocks * kDenseRows; i < work.output_stride(); ++i) {
      K2_EXPECT(out[size_t(t) * work.output_stride() + i] == 0.25f);
    }
  }
  return out;
}

void expect_equal(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i) K2_EXPECT(same_float(a[i], b[i]));
}

void compare_bf16(Random& random, const DenseTable& a, const DenseTable& b, int tokens) {
  const Work work(random, tokens);
  const HugeBuffer weights(size_t(work.blocks) * work.groups * kBf16BlockBytes);
  for (size_t i = 0; i < weights.bytes(); i += 2) {
    const uint16_t value = random_bf16(random);
    std::memcpy(weights.data() + i, &value, sizeof(value));
  }
  constexpr size_t kGroupBytes = kDenseGroup * sizeof(float);
  std::vector<uint8_t> input;
  for (int g = 0; g < work.groups; ++g) {
    for (int t = 0; t < tokens; ++t) {
      const float* group = work.input.data() + size_t(t) * work.inputs() + g * kDenseGroup;
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(group);
      input.insert(input.end(), bytes, bytes + kGroupBytes);
    }
  }
  expect_equal(compute(random, work, a, false, weights.data(), input),
               compute(random, work, b, false, weights.data(), input));
}

uint16_t random_scale(Random& random) {
  switch (pick(random, 0, 9)) {
    case 0: return 0;
    case 1: return uint16_t(0x437f - pick(random, 0, 9));  // close below 256
    default: return uint16_t(pick(random, 0x3800, 0x3f00));
  }
}

// The tokens' activations in the table's packed form; `bad` gets those that have none.
std::vector<uint8_t> pack(const Work& work, const DenseTable& table, std::vector<bool>& bad) {
  const ptrdiff_t stride = ptrdiff_t(work.tokens) * table.group_bytes;
  std::vector<uint8_t> packed(size_t(work.groups) * stride, 1);
  for (int t = 0; t < work.tokens; ++t) {
    const float* row = work.input.data() + size_t(t) * work.inputs();
    bad.push_back(!table.pack(row, work.groups, packed.data() + t * table.group_bytes, stride));
    for (int i = 0; i < work.groups * kDenseGroup; ++i) K2_EXPECT(std::isfinite(row[i]) || bad.back());
  }
  return packed;
}

void compare_int8(Random& random, const DenseTable& a, const DenseTable& b, int tokens) {
  Work work(random, tokens);
  const float special[] = {NAN, std::bit_cast<float>(0x7fffffffu), std::bit_cast<float>(0xffffffffu), INFINITY, -INFINITY,
                           32512.0f * 0x1p60f, 32513.0f * 0x1p60f, 1.0e-40f};
  if (pick(random, 0, 3) == 0) work.input[size_t(pick(random, 0, int(work.input.size()) - 1))] = special[pick(random, 0, 7)];
  const HugeBuffer weights(size_t(work.blocks) * work.groups * kInt8BlockBytes);
  for (size_t i = 0; i < weights.bytes(); ++i) weights.data()[i] = uint8_t(random());
  for (int block = 0; block < work.blocks * work.groups; ++block) {
    for (int row = 0; row < kDenseRows; ++row) {
      const uint16_t scale = random_scale(random);
      std::memcpy(weights.data() + block * kInt8BlockBytes + 2 * row, &scale, sizeof(scale));
    }
  }
  std::vector<bool> bad_a, bad_b;
  const std::vector<uint8_t> input_a = pack(work, a, bad_a), input_b = pack(work, b, bad_b);
  K2_EXPECT(bad_a == bad_b);
  expect_equal(compute(random, work, a, true, weights.data(), input_a),
               compute(random, work, b, true, weights.data(), input_b));
}

}  // namespace
}  // namespace k2

int main(int argc, char** argv) {
  using namespace k2;
  K2_EXPECT(argc == 5);
  const DenseTable& a = table_named(argv[1]);
  const DenseTable& b = table_named(argv[2]);
  Random random(std::stoull(argv[3]));
  const int cases = std::stoi(argv[4]);
  for (int i = 0; i < cases; ++i) {
    const int tokens = i < 30 ? i + 1 : pick(random, 1, kDenseTokens);  // every tile and split, then more of them
    compare_bf16(random, a, b, tokens);
    compare_int8(random, a, b, tokens);
  }
  std::printf("%d cases are equal\n", cases);
}
