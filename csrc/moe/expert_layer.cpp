#include "moe/expert_layer.h"

#include "core/error.h"
#include "moe/l32_digest.h"

namespace k2 {
namespace {

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

}  // namespace

void LayerShape::check() const {
  const std::string multiple = "a positive multiple of 32";
  check_argument(hidden > 0 && hidden % kGroup == 0, "hidden_size", multiple, hidden);
  check_argument(intermediate > 0 && intermediate % kGroup == 0, "moe_intermediate_size", multiple, intermediate);
  check_argument(experts > 0, "n_routed_experts", "at least 1", experts);
  check_argument(experts_per_token > 0, "num_experts_per_tok", "at least 1", experts_per_token);
}

ExpertLayer::ExpertLayer(const LayerShape& shape)
    : shape_((shape.check(), shape)),
      memory_(size_t(shape.expert_bytes()) * size_t(shape.experts)),
      checksums_(new uint64_t[shape.experts]()),
      loaded_(new std::atomic<bool>[shape.experts]()) {}

void ExpertLayer::pack(int expert, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down) {
  check_matrix("gate", gate, shape_.intermediate, shape_.hidden);
  check_matrix("up", up, shape_.intermediate, shape_.hidden);
  check_matrix("down", down, shape_.hidden, shape_.intermediate);
  begin(expert);
  pack_gate_up(expert, gate, up);
  pack_down(expert, down);
  finish(expert);
}

void ExpertLayer::begin(int expert) {
  check_argument(expert >= 0 && expert < shape_.experts, "expert", text("0..", shape_.experts - 1), expert);
  loaded_[expert].store(false);
  checksums_[expert] = 0;
}

void ExpertLayer::pack_gate_up(int expert, const PackedMatrix& gate, const PackedMatrix& up) {
  check_rows("gate", gate, shape_.intermediate, shape_.hidden, kHalfBlock);
  check_rows("up", up, shape_.intermediate, shape_.hidden, kHalfBlock);
  const int64_t block_bytes = int64_t(shape_.hidden_groups()) * kBlockBytes;
  uint8_t* out = place(expert) + gate.first_row / kHalfBlock * block_bytes;
  checksums_[expert] += pack_l32_gate_up(gate, up, out);
}

void ExpertLayer::pack_down(int expert, const PackedMatrix& down) {
  check_rows("down", down, shape_.hidden, shape_.intermediate, kRowBlock);
  const int64_t block_bytes = int64_t(shape_.intermediate_groups()) * kBlockBytes;
  uint8_t* out = place(expert) + shape_.w13_bytes() + down.first_row / kRowBlock * block_bytes;
  checksums_[expert] += pack_l32(down, out);
}

uint64_t ExpertLayer::checksum(int expert) const {
  check_loaded(expert);
  return checksums_[expert];
}

uint64_t ExpertLayer::memory_checksum(int expert) const {
  check_loaded(expert);
  return digest_blocks(w13(expert), L32Matrix::kGateUp, 0, shape_.w13_bytes() / kBlockBytes) +
         digest_blocks(w2(expert), L32Matrix::kDown, 0, shape_.w2_bytes() / kBlockBytes);
}

void ExpertLayer::check_loaded(int expert) const {
  check_argument(expert >= 0 && expert < shape_.experts, "expert", text("0..", shape_.experts - 1), expert);
  check_argument(loaded(expert), "expert", "a loaded one", expert);
}

void ExpertLayer::unpack(int expert, const MutablePackedMatrix& gate, const MutablePackedMatrix& up,
                         const MutablePackedMatrix& down) const {
  check_loaded(expert);
  check_matrix("gate", gate, shape_.intermediate, shape_.hidden);
  check_matrix("up", up, shape_.intermediate, shape_.hidden);
  check_matrix("down", down, shape_.hidden, shape_.intermediate);
  unpack_l32_gate_up(w13(expert), gate, up);
  unpack_l32(w2(expert), down);
}

}  // namespace k2
