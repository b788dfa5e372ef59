#include "moe/expert_layer.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "moe/l32_digest.h"

namespace k2 {
namespace {

constexpr int kNoPlace = -1;

template <class Matrix>
void check_matrix(const char* name, const Matrix& matrix, int rows, int inputs) {
  const bool fits = matrix.rows == rows && matrix.inputs == inputs;
  check_argument(fits, name, text("[", rows, ", ", inputs, "]"), text("[", matrix.rows, ", ", matrix.inputs, "]"));
}

void check_rows(const char* name, const PackedMatrix& matrix, int rows, int inputs, int multiple) {
  const bool fits = matrix.inputs == inputs && matrix.first_row >= 0 && matrix.first_row <= rows - matrix.rows &&
                    matrix.first_row % multiple == 0 && matrix.rows % multiple == 0;
  check_argument(fits, name, text("rows in [", rows, ", ", inputs, "] in multiples of ", multiple),
                 text("[", matrix.rows, ", ", matrix.inputs, "] from row ", matrix.first_row));
}

// Rows first..last-1 of the whole matrix, of which `matrix` holds some: these among them.
PackedMatrix row_range(PackedMatrix matrix, int first, int last) {
  const int64_t skipped = first - matrix.first_row;
  matrix.words += skipped * (matrix.inputs / 8);
  matrix.scales += skipped * (matrix.inputs / kGroup);
  matrix.first_row = first;
  matrix.rows = last - first;
  return matrix;
}

MutablePackedMatrix row_range(const MutablePackedMatrix& matrix, int first, int last) {
  return {matrix.words + int64_t(first) * (matrix.inputs / 8), matrix.scales + int64_t(first) * (matrix.inputs / kGroup),
          last - first, matrix.inputs};
}

}  // namespace

void LayerShape::check() const {
  const std::string multiple = "a positive multiple of 32";
  check_argument(hidden > 0 && hidden % kGroup == 0, "hidden_size", multiple, hidden);
  check_argument(intermediate > 0 && intermediate % kGroup == 0, "moe_intermediate_size", multiple, intermediate);
  check_argument(experts > 0, "n_routed_experts", "at least 1", experts);
  check_argument(experts_per_token > 0, "num_experts_per_tok", "at least 1", experts_per_token);
}

std::vector<GroupRange> slice_channels(int groups, int nodes) {
  std::vector<GroupRange> slices;
  for (int node = 0; node < nodes; ++node) {
    const int first = int(int64_t(groups) * node / nodes), last = int(int64_t(groups) * (node + 1) / nodes);
    slices.push_back({first, last - first});
  }
  return slices;
}

ExpertLayer::ExpertLayer(const LayerShape& shape, const std::vector<int>& memory_nodes, int room,
                         const PackTable& packer)
    : shape_((shape.check(), shape)),
      room_(room),
      packer_(packer),
      places_(new std::atomic<int>[shape.experts]),
      checksums_(new uint64_t[shape.experts]()),
      loaded_(new std::atomic<bool>[shape.experts]()) {
  check_argument(!memory_nodes.empty(), "nodes", "at least one", "none");
  check_argument(room >= 0 && room <= shape.experts, "room", text("0..", shape.experts), room);
  for (int expert = 0; expert < shape.experts; ++expert) places_[expert].store(kNoPlace);
  const std::vector<GroupRange> channels = slice_channels(shape.intermediate_groups(), int(memory_nodes.size()));
  for (size_t node = 0; node < memory_nodes.size(); ++node) {
    const int64_t blocks = int64_t(channels[node].count) * shape.hidden_groups();  // of w2; w13 has twice as many
    const int64_t bytes = 3 * blocks * kBlockBytes;
    slices_.push_back({channels[node], 2 * blocks * kBlockBytes, bytes,
                       HugeBuffer(size_t(bytes) * size_t(room), memory_nodes[node])});
  }
}

size_t ExpertLayer::bytes() const {
  size_t bytes = 0;
  for (const Slice& slice : slices_) bytes += slice.memory.bytes();
  return bytes;
}

std::vector<const HugeBuffer*> ExpertLayer::buffers() const {
  std::vector<const HugeBuffer*> buffers;
  for (const Slice& slice : slices_) buffers.push_back(&slice.memory);
  return buffers;
}

bool ExpertLayer::bound() const {
  return std::all_of(slices_.begin(), slices_.end(), [](const Slice& slice) { return slice.memory.bound(); });
}

PageCount ExpertLayer::count_pages() const {
  PageCount sum;
  for (const Slice& slice : slices_) {
    const PageCount count = k2::count_pages(slice.memory);
    sum.resident += count.resident;
    sum.huge += count.huge;
  }
  return sum;
}

void ExpertLayer::pack(int expert, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down) {
  check_matrix("gate", gate, shape_.intermediate, shape_.hidden);
  check_matrix("up", up, shape_.intermediate, shape_.hidden);
  check_matrix("down", down, shape_.hidden, shape_.intermediate);
  begin(expert);
  pack_gate_up(expert, gate, up);
  pack_down(expert, down);
  finish(expert);
}

void ExpertLayer::check_expert(int expert) const {
  check_argument(expert >= 0 && expert < shape_.experts, "expert", text("0..", shape_.experts - 1), expert);
}

void ExpertLayer::begin(int expert) {
  check_expert(expert);
  if (places_[expert].load() == kNoPlace) {
    const int place = taken_.fetch_add(1);
    check_argument(place < room_, "expert", text("at most ", room_, " of them"), text("one more, ", expert));
    places_[expert].store(place);
  }
  loaded_[expert].store(false);
  checksums_[expert] = 0;
}

void ExpertLayer::pack_gate_up(int expert, const PackedMatrix& gate, const PackedMatrix& up) {
  check_rows("gate", gate, shape_.intermediate, shape_.hidden, kHalfBlock);
  check_rows("up", up, shape_.intermediate, shape_.hidden, kHalfBlock);
  const int64_t block_bytes = int64_t(shape_.hidden_groups()) * kBlockBytes;
  for (const Slice& slice : slices_) {
    const int begin = slice.channels.first * kGroup, end = begin + slice.channels.count * kGroup;
    const int first = std::max(gate.first_row, begin), last = std::min(gate.first_row + gate.rows, end);
    if (first >= last) continue;
    uint8_t* out = place(slice, expert) + (first - begin) / kHalfBlock * block_bytes;
    checksums_[expert] += pack_l32_gate_up(packer_, row_range(gate, first, last), row_range(up, first, last), out);
  }
}

void ExpertLayer::pack_down(int expert, const PackedMatrix& down) {
  check_rows("down", down, shape_.hidden, shape_.intermediate, kRowBlock);
  for (const Slice& slice : slices_) {
    const int64_t block_bytes = int64_t(slice.channels.count) * kBlockBytes;
    uint8_t* out = place(slice, expert) + slice.w13_bytes + down.first_row / kRowBlock * block_bytes;
    checksums_[expert] += pack_l32(packer_, down, slice.channels, out);
  }
}

uint64_t ExpertLayer::checksum(int expert) const {
  check_loaded(expert);
  return checksums_[expert];
}

uint64_t ExpertLayer::memory_checksum(int expert) const {
  check_loaded(expert);
  uint64_t sum = 0;
  for (int node = 0; node < nodes(); ++node) {
    const Slice& slice = slices_[node];
    const int64_t count = slice.channels.count;
    const int64_t w13_first = 2 * int64_t(slice.channels.first) * shape_.hidden_groups();
    sum += digest_blocks(w13(expert, node), L32Matrix::kGateUp, w13_first, slice.w13_bytes / kBlockBytes);
    for (int64_t block = 0; block < shape_.hidden_groups(); ++block) {
      sum += digest_blocks(w2(expert, node) + block * count * kBlockBytes, L32Matrix::kDown,
                           block * shape_.intermediate_groups() + slice.channels.first, count);
    }
  }
  return sum;
}

void ExpertLayer::check_loaded(int expert) const {
  check_expert(expert);
  check_argument(loaded(expert), "expert", "a loaded one", expert);
}

void ExpertLayer::unpack(int expert, const MutablePackedMatrix& gate, const MutablePackedMatrix& up,
                         const MutablePackedMatrix& down) const {
  check_loaded(expert);
  check_matrix("gate", gate, shape_.intermediate, shape_.hidden);
  check_matrix("up", up, shape_.intermediate, shape_.hidden);
  check_matrix("down", down, shape_.hidden, shape_.intermediate);
  for (int node = 0; node < nodes(); ++node) {
    const int first = channels(node).first * kGroup, last = first + channels(node).count * kGroup;
    unpack_l32_gate_up(w13(expert, node), row_range(gate, first, last), row_range(up, first, last));
    unpack_l32(w2(expert, node), channels(node), down);
  }
}

template <class Visit>
void ExpertLayer::each_run(int expert, Visit visit) const {
  int64_t first = 0;  // of w13
  for (const Slice& slice : slices_) {
    const GroupRange range = slice.channels;
    if (range.count == 0) continue;
    uint8_t* here = place(slice, expert);
    visit(here, first, L32Matrix::kGateUp, size_t(slice.w13_bytes));
    first += slice.w13_bytes;
    const int64_t row_bytes = int64_t(range.count) * kBlockBytes;
    for (int64_t block = 0; block < shape_.hidden_groups(); ++block) {
      const int64_t at = (block * shape_.intermediate_groups() + range.first) * kBlockBytes;
      visit(here + slice.w13_bytes + block * row_bytes, at, L32Matrix::kDown, size_t(row_bytes));
    }
  }
}

void ExpertLayer::copy_l32(int expert, uint8_t* w13_out, uint8_t* w2_out) const {
  check_loaded(expert);
  each_run(expert, [&](const uint8_t* here, int64_t at, L32Matrix matrix, size_t bytes) {
    std::memcpy((matrix == L32Matrix::kGateUp ? w13_out : w2_out) + at, here, bytes);
  });
}

void ExpertLayer::store(int expert, const uint8_t* w13, const uint8_t* w2, uint64_t checksum) {
  begin(expert);
  each_run(expert, [&](uint8_t* here, int64_t at, L32Matrix matrix, size_t bytes) {
    std::memcpy(here, (matrix == L32Matrix::kGateUp ? w13 : w2) + at, bytes);
  });
  checksums_[expert] = checksum;
  finish(expert);
}

void ExpertLayer::replace(int old, int now, const uint8_t* w13, const uint8_t* w2, uint64_t checksum) {
  check_loaded(old);
  check_expert(now);
  check_argument(!loaded(now), "expert", "one that is not here", now);
  loaded_[old].store(false);
  places_[now].store(places_[old].exchange(kNoPlace));
  store(now, w13, w2, checksum);
}

}  // namespace k2
