#include "moe/expert_layer.h"

#include "core/error.h"

namespace k2 {
namespace {

template <class Matrix>
void check_matrix(const char* name, const Matrix& matrix, int rows, int inputs) {
  const bool fits = matrix.rows == rows && matrix.inputs == inputs;
  check_argument(fits, name, text("[", rows, ", ", inputs, "]"), text("[", matrix.rows, ", ", matrix.inputs, "]"));
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
      loaded_(new std::atomic<bool>[shape.experts]()) {}

void ExpertLayer::pack(int expert, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down) {
  check_argument(expert >= 0 && expert < shape_.experts, "expert", text("0..", shape_.experts - 1), expert);
  check_matrix("gate", gate, shape_.intermediate, shape_.hidden);
  check_matrix("up", up, shape_.intermediate, shape_.hidden);
  check_matrix("down", down, shape_.hidden, shape_.intermediate);
  loaded_[expert].store(false);
  pack_l32_gate_up(gate, up, place(expert));
  pack_l32(down, place(expert) + shape_.w13_bytes());
  loaded_[expert].store(true, std::memory_order_release);
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
