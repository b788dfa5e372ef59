// Compares two kernel tables bit for bit on random work of ragged sizes: compare_tables NUMERICS REFERENCE OTHER SEED CASES
//
// REFERENCE has A16 in planes. The CPU is not asked whether it supports them: a table may be built on a model of its instructions.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/huge_buffer.h"
#include "cpu/features.h"
#include "kernels/a16.h"
#include "kernels/kernel_list.h"
#include "kernels/l32.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937_64;

int pick(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

const KernelTable& table_named(const std::string& name, Numerics numerics) {
  if (const KernelTable* table = kernel_table(find_isa(name), numerics)) return *table;
  std::fprintf(stderr, "no table %s, %s in this build\n", name.c_str(), numerics_name(numerics));
  std::exit(2);
}

uint16_t random_scale(Random& random) {
  switch (pick(random, 0, 9)) {
    case 0: return 0;                                      // zero
    case 1: return uint16_t(pick(random, 1, 0x7f));        // denormal
    case 2: return uint16_t(0x437f - pick(random, 0, 9));  // close below 256
    default: return uint16_t(pick(random, 0x3800, 0x3f00) | (pick(random, 0, 1) << 15));
  }
}

HugeBuffer random_blocks(Random& random, int blocks) {
  HugeBuffer buffer(size_t(blocks) * kBlockBytes);
  for (int b = 0; b < blocks; ++b) {
    uint8_t* block = buffer.data() + b * kBlockBytes;
    for (int i = 0; i < kRowBlock; ++i) {
      const uint16_t scale = random_scale(random);
      std::memcpy(block + 2 * i, &scale, sizeof(scale));
    }
    for (int i = kScaleBytes; i < kBlockBytes; ++i) block[i] = uint8_t(random());
  }
  return buffer;
}

float random_special(Random& random) {
  const float values[] = {std::numeric_limits<float>::quiet_NaN(),
                          std::bit_cast<float>(0x7fffffffu),  // the NaN that is largest as an integer
                          std::bit_cast<float>(0xffffffffu),
                          std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity(),
                          32512.0f * 0x1p60f,
                          32513.0f * 0x1p60f,
                          -3.0e38f,
                          1.0e-40f,
                          -0.0f,
                          0x1p67f,
                          -0x1.fffffep66f,
                          0x1p-61f,
                          0x1.fffffep-62f};
  return values[pick(random, 0, int(std::size(values)) - 1)];
}

std::vector<float> random_activations(Random& random, int groups) {
  std::vector<float> x(size_t(groups) * kGroup);
  std::normal_distribution<float> normal;
  for (int g = 0; g < groups; ++g) {
    const int kind = pick(random, 0, 11);
    const float size = kind == 0 ? 0.0f : std::ldexp(1.0f, kind <= 2 ? pick(random, -150, 75) : pick(random, -6, 6));
    for (int i = 0; i < kGroup; ++i) x[g * kGroup + i] = size * normal(random);
    if (kind == 3) x[g * kGroup + pick(random, 0, 31)] *= 1000.0f;
    if (kind == 4 && pick(random, 0, 3) == 0) x[g * kGroup + pick(random, 0, 31)] = random_special(random);
    if (kind == 5) x[g * kGroup + pick(random, 0, 31)] = size * 1.984375f;  // the edge of the largest integer
  }
  return x;
}

bool same_float(float a, float b) {
  return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (std::isnan(a) && std::isnan(b));
}

using Packed = std::vector<std::vector<uint8_t>>;

struct BothPacked {
  Packed a, b;
};

// A16 in planes as the table has it.
std::vector<uint8_t> from_planes(const KernelTable& table, std::vector<uint8_t> packed) {
  if (!table.words) return packed;
  for (size_t at = 0; at + sizeof(A16Group) <= packed.size(); at += sizeof(A16Group)) {
    A16Group planes;
    std::memcpy(&planes, packed.data() + at, sizeof(planes));
    A16Words words{.n = {}, .exponent = planes.exponent, .correction = planes.correction};
    for (int i = 0; i < kGroup; ++i) {
      const int input = i / 8 * 8 + kWordOrder[i % 8];
      words.n[i] = int16_t(256 * planes.high[input] + planes.low[input]);
    }
    std::memcpy(packed.data() + at, &words, sizeof(words));
  }
  return packed;
}

// Instruction sets may have different forms for the hidden state; equal forms must have equal bytes.
BothPacked pack_all(Random& random, const KernelTable& a, const KernelTable& b, int groups, int tokens) {
  const bool same_form = std::string(a.activations) == b.activations && !a.words;
  BothPacked packed;
  for (int t = 0; t < tokens; ++t) {
    const std::vector<float> x = random_activations(random, groups);
    std::vector<uint8_t> pa(size_t(groups) * a.group_bytes, 1), pb(size_t(groups) * b.group_bytes, 2);
    bool fits;
    if (pick(random, 0, 1)) {
      fits = a.pack_fp32(x.data(), groups, pa.data());
      K2_EXPECT(fits == b.pack_fp32(x.data(), groups, pb.data()));
    } else {
      std::vector<uint16_t> bf16;
      for (const float value : x) bf16.push_back(uint16_t(std::bit_cast<uint32_t>(value) >> 16));
      fits = a.pack_bf16(bf16.data(), groups, pa.data());
      K2_EXPECT(fits == b.pack_bf16(bf16.data(), groups, pb.data()));
    }
    for (const float value : x) K2_EXPECT(std::isfinite(value) || !fits);
    if (same_form) K2_EXPECT(from_planes(b, pa) == pb);
    packed.a.push_back(std::move(pa));
    packed.b.push_back(std::move(pb));
  }
  return packed;
}

std::vector<const uint8_t*> pointers(const Packed& rows) {
  std::vector<const uint8_t*> out;
  for (const auto& row : rows) out.push_back(row.data());
  return out;
}

// Results must not depend on it.
CallPolicy random_policy(Random& random) {
  const int distances[] = {0, 0, 4096, 9216};
  return {.streams = 1 << pick(random, 0, 2),
          .prefetch_one = distances[pick(random, 0, 3)],
          .prefetch_many = distances[pick(random, 0, 3)],
          .tiles_from = pick(random, 1, 9)};
}

void compare_gate_up(Random& random, const KernelTable& a, const KernelTable& b, int tokens) {
  const int groups = pick(random, 1, 9), pairs = pick(random, 1, 11);
  const HugeBuffer weights = random_blocks(random, 2 * pairs * groups);
  const BothPacked packed = pack_all(random, a, b, groups, tokens);
  const std::vector<const uint8_t*> input[2] = {pointers(packed.a), pointers(packed.b)};
  const size_t bytes = size_t(pairs) * a.group_bytes;
  const KernelTable* const tables[2] = {&a, &b};
  std::vector<uint8_t> results[2];
  uint64_t bad[2];
  for (int i = 0; i < 2; ++i) {
    results[i].assign(bytes * tokens + 64, 0xa5);
    std::vector<uint8_t*> output;
    for (int t = 0; t < tokens; ++t) output.push_back(results[i].data() + t * bytes);
    const HugeBuffer scratch(scratch_bytes(*tables[i], groups));
    bad[i] = tables[i]->gate_up({weights.data(), groups, pairs, tokens, input[i].data(), output.data(),
                                  random_policy(random), scratch.data()});
    for (int guard = 0; guard < 64; ++guard) K2_EXPECT(results[i][bytes * tokens + guard] == 0xa5);
  }
  K2_EXPECT(bad[0] == bad[1]);
  for (int t = 0; t < tokens; ++t) {
    const auto row = results[0].begin() + ptrdiff_t(t * bytes), other = results[1].begin() + ptrdiff_t(t * bytes);
    K2_EXPECT(from_planes(b, {row, row + ptrdiff_t(bytes)}) == std::vector<uint8_t>(other, other + ptrdiff_t(bytes)));
  }
}

// The intermediate has one form for all instruction sets, but for A16Words: that of the table `form`.
void compare_down(Random& random, const KernelTable& a, const KernelTable& b, const KernelTable& form, int tokens) {
  const int groups = pick(random, 1, 9), blocks = pick(random, 1, 11), gap = pick(random, 0, 2);
  const HugeBuffer weights = random_blocks(random, blocks * (groups + gap));
  const BothPacked packed = pack_all(random, form, form, groups, tokens);
  Packed other;
  for (const std::vector<uint8_t>& row : packed.a) other.push_back(from_planes(b, row));
  const std::vector<const uint8_t*> input[2] = {pointers(packed.a), pointers(other)};
  std::normal_distribution<float> normal;
  std::vector<float> factor(tokens), start(size_t(tokens) * blocks * kRowBlock + 16);
  for (float& f : factor) f = pick(random, 0, 9) == 0 ? std::numeric_limits<float>::quiet_NaN() : normal(random);
  for (float& f : start) f = normal(random);
  const KernelTable* const tables[2] = {&a, &b};
  std::vector<float> results[2];
  for (int i = 0; i < 2; ++i) {
    results[i] = start;
    std::vector<float*> output;
    for (int t = 0; t < tokens; ++t) output.push_back(results[i].data() + size_t(t) * blocks * kRowBlock);
    const HugeBuffer scratch(scratch_bytes(*tables[i], groups));
    tables[i]->down({weights.data(), groups, blocks, tokens, (groups + gap) * ptrdiff_t(kBlockBytes),
                     input[i].data(), factor.data(), output.data(), random_policy(random), scratch.data()});
    for (size_t guard = start.size() - 16; guard < start.size(); ++guard) K2_EXPECT(results[i][guard] == start[guard]);
  }
  for (size_t i = 0; i < start.size(); ++i) K2_EXPECT(same_float(results[0][i], results[1][i]));
}

}  // namespace
}  // namespace k2

int main(int argc, char** argv) {
  using namespace k2;
  K2_EXPECT(argc == 6);
  machine_features();  // asks the system for AMX's registers, where the CPU has them
  const Numerics numerics = find_numerics(argv[1]);
  const KernelTable& a = table_named(argv[2], numerics);
  const KernelTable& b = table_named(argv[3], numerics);
  K2_EXPECT(a.group_bytes == b.group_bytes && !a.words);
  const KernelTable& form = numerics == kBf16 ? table_named(argv[2], kExact) : a;
  Random random(std::stoull(argv[4]));
  const int cases = std::stoi(argv[5]);
  for (int i = 0; i < cases; ++i) {
    // Every tile size and split, then the largest call.
    const int tokens = i < 20 ? i + 1 : pick(random, 1, std::min(a.max_tokens, b.max_tokens));
    compare_gate_up(random, a, b, tokens);
    compare_down(random, a, b, form, tokens);
  }
  std::printf("%d cases are equal\n", cases);
}
