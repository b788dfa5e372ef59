// Packing in pieces, checksums and refusals, for the sanitizers: l32_pack_test SEED [ISA]
//
// With an instruction set its packer gives the bits of the portable one. The layout itself is tested from Python.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "moe/expert_layer.h"
#include "moe/l32_digest.h"
#include "testing/check.h"

namespace k2 {
namespace {

using Random = std::mt19937_64;

// Exactly as large as the matrix: a read beyond it is seen by the address sanitizer.
struct Matrix {
  Matrix(Random& random, const char* name, int rows, int inputs)
      : name(name), rows(rows), inputs(inputs), words(size_t(rows) * inputs / 8), scales(size_t(rows) * inputs / 32) {
    for (uint32_t& word : words) word = uint32_t(random());
    for (uint16_t& scale : scales) scale = uint16_t(random() % 0x4380 | (random() % 2) << 15);
  }
  PackedMatrix from(int first, int count) const {
    return {.words = words.data() + int64_t(first) * inputs / 8,
            .scales = scales.data() + int64_t(first) * inputs / 32,
            .rows = count,
            .inputs = inputs,
            .first_row = first,
            .name = name};
  }
  PackedMatrix all() const { return from(0, rows); }

  const char* name;
  int rows, inputs;
  std::vector<uint32_t> words;
  std::vector<uint16_t> scales;
};

struct Expert {
  Expert(Random& random, const LayerShape& s)
      : gate(random, "gate", s.intermediate, s.hidden),
        up(random, "up", s.intermediate, s.hidden),
        down(random, "down", s.hidden, s.intermediate) {}
  Matrix gate, up, down;
};

bool same_memory(const ExpertLayer& layer, int a, int b) {
  return std::memcmp(layer.w13(a), layer.w13(b), size_t(layer.shape().expert_bytes())) == 0;
}

void pieces_make_the_whole(Random& random) {
  const LayerShape shape{32 * int(1 + random() % 9), 32 * int(1 + random() % 5), 2, 1};
  ExpertLayer layer(shape);
  const Expert expert(random, shape);
  layer.pack(0, expert.gate.all(), expert.up.all(), expert.down.all());
  layer.begin(1);
  for (int row = shape.hidden - 32; row >= 0; row -= 32) layer.pack_down(1, expert.down.from(row, 32));
  K2_EXPECT(!layer.loaded(1));
  for (int row = 0; row < shape.intermediate;) {
    const int rows = 16 * int(1 + random() % unsigned((shape.intermediate - row) / 16));
    layer.pack_gate_up(1, expert.gate.from(row, rows), expert.up.from(row, rows));
    row += rows;
  }
  layer.finish(1);
  K2_EXPECT(same_memory(layer, 0, 1));
  K2_EXPECT(layer.checksum(0) == layer.checksum(1));
  K2_EXPECT(layer.memory_checksum(0) == layer.checksum(0));
}

std::vector<uint8_t> copy_l32(const ExpertLayer& layer, int expert) {
  std::vector<uint8_t> out(size_t(layer.shape().expert_bytes()));
  layer.copy_l32(expert, out.data(), out.data() + layer.shape().w13_bytes());
  return out;
}

// Slices on several nodes hold what one node would: put together again, unpacked, and by their checksums.
void slices_make_the_whole(Random& random) {
  const LayerShape shape{32 * int(1 + random() % 9), 32 * int(1 + random() % 7), 2, 1};
  ExpertLayer whole(shape);
  const Expert expert(random, shape);
  whole.pack(1, expert.gate.all(), expert.up.all(), expert.down.all());
  K2_EXPECT(copy_l32(whole, 1) == std::vector<uint8_t>(whole.w13(1), whole.w13(1) + shape.expert_bytes()));
  const int nodes = 2 + int(random() % 4);  // perhaps more than there are groups of channels
  ExpertLayer sliced(shape, std::vector<int>(size_t(nodes), kAnyNode));
  K2_EXPECT(sliced.nodes() == nodes && sliced.bound() && sliced.bytes() == whole.bytes());
  sliced.begin(1);
  for (int row = 0; row < shape.intermediate;) {  // pieces end where they like
    const int rows = 16 * int(1 + random() % unsigned((shape.intermediate - row) / 16));
    sliced.pack_gate_up(1, expert.gate.from(row, rows), expert.up.from(row, rows));
    row += rows;
  }
  for (int row = 0; row < shape.hidden; row += 32) sliced.pack_down(1, expert.down.from(row, 32));
  sliced.finish(1);
  K2_EXPECT(copy_l32(sliced, 1) == copy_l32(whole, 1));
  K2_EXPECT(sliced.checksum(1) == whole.checksum(1));
  K2_EXPECT(sliced.memory_checksum(1) == whole.checksum(1));
  Expert back(random, shape);
  auto view = [](Matrix& m) { return MutablePackedMatrix{m.words.data(), m.scales.data(), m.rows, m.inputs}; };
  sliced.unpack(1, view(back.gate), view(back.up), view(back.down));
  for (const auto& [got, packed] : {std::pair{&back.gate, &expert.gate}, {&back.up, &expert.up},
                                    {&back.down, &expert.down}}) {
    K2_EXPECT(got->words == packed->words && got->scales == packed->scales);
  }
  for (int node = 0; node < nodes; ++node) {
    if (sliced.channels(node).count == 0) continue;
    uint8_t* last = const_cast<uint8_t*>(sliced.w2(1, node)) +
                    int64_t(sliced.channels(node).count) * shape.hidden_groups() * kBlockBytes - 1;
    *last ^= 1;
    K2_EXPECT(sliced.memory_checksum(1) != whole.checksum(1));
    *last ^= 1;
  }
}

// Ragged numbers of groups, and perhaps two nodes with a part of each row of down.
void packers_agree(Random& random, const PackTable& packer) {
  const LayerShape shape{32 * int(1 + random() % 11), 32 * int(2 + random() % 9), 1, 1};
  const std::vector<int> nodes(1 + random() % 2, kAnyNode);
  ExpertLayer expected(shape, nodes), got(shape, nodes, 1, packer);
  for (int round = 0; round < 2; ++round) {
    const Expert expert(random, shape);
    for (ExpertLayer* layer : {&expected, &got}) layer->pack(0, expert.gate.all(), expert.up.all(), expert.down.all());
    K2_EXPECT(copy_l32(got, 0) == copy_l32(expected, 0));
    K2_EXPECT(got.checksum(0) == expected.checksum(0) && got.memory_checksum(0) == expected.checksum(0));
  }
}

// A slice of each size, whole tiles and not: it is the inverse of unpacking, and nothing around its blocks is written to.
void every_number_of_groups_is_packed(Random& random, const PackTable& packer) {
  for (int count = 1; count <= 13; ++count) {
    const int before = int(random() % 4), after = int(random() % 4);
    const Matrix matrix(random, "down", 64, 32 * (before + count + after));
    const size_t bytes = size_t(2) * count * kBlockBytes, margin = 4 * kBlockBytes;
    const HugeBuffer memory(margin + bytes + margin);
    uint8_t* const blocks = memory.data() + margin;
    const GroupRange groups{before, count};
    uint64_t expected = 0;
    const uint64_t sum = pack_l32(packer, matrix.all(), groups, blocks);
    for (int block = 0; block < 2; ++block) {
      const int64_t index = int64_t(block) * (before + count + after) + before;
      expected += digest_blocks(blocks + int64_t(block) * count * kBlockBytes, L32Matrix::kDown, index, count);
    }
    K2_EXPECT(sum == expected);
    for (size_t i = 0; i < margin; ++i) K2_EXPECT(memory.data()[i] == 0 && blocks[bytes + i] == 0);
    Matrix back = matrix;
    for (int row = 0; row < matrix.rows; ++row) {
      std::fill_n(back.words.begin() + (int64_t(row) * matrix.inputs + before * 32) / 8, count * 4, 0);
      std::fill_n(back.scales.begin() + int64_t(row) * matrix.inputs / 32 + before, count, 0);
    }
    unpack_l32(blocks, groups, {back.words.data(), back.scales.data(), back.rows, back.inputs});
    K2_EXPECT(back.words == matrix.words && back.scales == matrix.scales);
  }
}

void channels_are_cut_without_gap_or_overlap(Random& random) {
  for (int round = 0; round < 100; ++round) {
    const int groups = int(random() % 70), nodes = 1 + int(random() % 9);
    int next = 0;
    for (const GroupRange& range : slice_channels(groups, nodes)) {
      K2_EXPECT(range.first == next && range.count >= groups / nodes && range.count <= groups / nodes + 1);
      next += range.count;
    }
    K2_EXPECT(next == groups);
  }
}

void every_flipped_bit_is_noticed(Random& random) {
  const LayerShape shape{96, 64, 2, 1};
  ExpertLayer layer(shape);
  const Expert expert(random, shape);
  layer.pack(1, expert.gate.all(), expert.up.all(), expert.down.all());
  uint8_t* memory = const_cast<uint8_t*>(layer.w13(1));
  for (int64_t byte = 0; byte < shape.expert_bytes(); ++byte) {
    const int bit = int(random() % 8);
    memory[byte] ^= uint8_t(1 << bit);
    K2_EXPECT(layer.memory_checksum(1) != layer.checksum(1));
    memory[byte] ^= uint8_t(1 << bit);
  }
  K2_EXPECT(layer.memory_checksum(1) == layer.checksum(1));
}

// The checksum is a sum over blocks: the place of a block has to count.
void exchanged_blocks_and_matrices_are_noticed(Random& random) {
  std::vector<uint8_t> blocks(2 * kBlockBytes), swapped;
  for (uint8_t& byte : blocks) byte = uint8_t(random());
  swapped.assign(blocks.begin() + kBlockBytes, blocks.end());
  swapped.insert(swapped.end(), blocks.begin(), blocks.begin() + kBlockBytes);
  const uint64_t sum = digest_blocks(blocks.data(), L32Matrix::kDown, 0, 2);
  K2_EXPECT(sum != digest_blocks(swapped.data(), L32Matrix::kDown, 0, 2));
  K2_EXPECT(sum != digest_blocks(blocks.data(), L32Matrix::kDown, 1, 2));
  K2_EXPECT(sum != digest_blocks(blocks.data(), L32Matrix::kGateUp, 0, 2));
  K2_EXPECT(sum == digest_block(blocks.data() + kBlockBytes, L32Matrix::kDown, 1) +
                       digest_block(blocks.data(), L32Matrix::kDown, 0));
}

std::string refusal(ExpertLayer& layer, const Expert& expert) {
  try {
    layer.pack(0, expert.gate.all(), expert.up.all(), expert.down.all());
  } catch (const WeightError& error) {
    K2_EXPECT(!layer.loaded(0));
    return error.what();
  }
  return "";
}

void a_scale_out_of_range_is_placed(Random& random, const PackTable& packer) {
  const LayerShape shape{32 * int(1 + random() % 9), 64, 1, 1};
  ExpertLayer layer(shape, {kAnyNode}, 1, packer);
  const struct {
    uint16_t bits;
    const char* said;
  } cases[] = {{0x7f80, "infinity"}, {0xff80, "-infinity"}, {0x7fc1, "NaN"}, {0xff81, "NaN"}, {0x4380, "256"},
               {0xc400, "-512"}};
  for (const auto& c : cases) {
    for (const int which : {0, 1, 2}) {
      Expert expert(random, shape);
      Matrix& bad = which == 0 ? expert.gate : which == 1 ? expert.up : expert.down;
      const size_t at = random() % bad.scales.size();
      bad.scales[at] = c.bits;
      const int groups = bad.inputs / 32, row = int(at) / groups, group = int(at) % groups;
      K2_EXPECT(refusal(layer, expert) ==
                text(bad.name, ": scale of row ", row, ", group ", group,
                     ": expected a finite number below 256 in magnitude, got ", c.said));
    }
  }
}

void rows_outside_the_matrix_are_refused(Random& random) {
  const LayerShape shape{64, 64, 1, 1};
  ExpertLayer layer(shape);
  const Expert expert(random, shape);
  PackedMatrix beyond = expert.down.from(32, 32);
  beyond.first_row = 64;
  PackedMatrix crooked = expert.down.from(16, 32);
  layer.begin(0);
  for (const PackedMatrix& rows : {beyond, crooked}) {
    bool refused = false;
    try {
      layer.pack_down(0, rows);
    } catch (const ArgumentError&) {
      refused = true;
    }
    K2_EXPECT(refused);
  }
}

}  // namespace
}  // namespace k2

int main(int count, char** arguments) {
  k2::Random random(std::stoull(arguments[1]));
  for (int round = 0; round < 20; ++round) k2::pieces_make_the_whole(random);
  for (int round = 0; round < 20; ++round) k2::slices_make_the_whole(random);
  k2::channels_are_cut_without_gap_or_overlap(random);
  k2::every_flipped_bit_is_noticed(random);
  k2::exchanged_blocks_and_matrices_are_noticed(random);
  const k2::PackTable& packer = k2::find_packer(count > 2 ? arguments[2] : "portable");
  for (int round = 0; round < 20; ++round) k2::packers_agree(random, packer);
  k2::every_number_of_groups_is_packed(random, packer);
  k2::a_scale_out_of_range_is_placed(random, packer);
  k2::rows_outside_the_matrix_are_refused(random);
  std::puts("ok");
}
