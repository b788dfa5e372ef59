#include "attention/append.h"

#include <cstring>
#include <utility>

#include "core/bf16.h"
#include "core/error.h"
#include "rows/rotate.h"

namespace k2 {

Append::Append(const MlaSizes& sizes, AppendInput input)
    : sizes_(sizes), input_(std::move(input)), slots_(size_t(input_.tokens), -1) {
  check_argument(sizes_.rope % 2 == 0, "rope", "an even number of columns", sizes_.rope);
  check_argument(input_.latent_stride >= sizes_.latent, "latent", text("at least ", sizes_.latent, " columns"),
                 input_.latent_stride);
  for (const AttentionSequence& s : input_.sequences) {
    input_.pages.check(s, input_.tokens);
    for (int64_t i = 0; i < s.rows; ++i) slots_[size_t(s.first_row + i)] = input_.pages.slot(s, s.cached + i);
  }
}

void Append::operator()(int64_t first, int64_t last) const {
  const MlaSizes& s = sizes_;
  const int pairs = s.rope / 2;
  std::vector<float> latent(size_t(s.latent));
  for (int64_t row = first; row < last; ++row) {
    const Turn turn(input_.cos + row * pairs, input_.sin + row * pairs, pairs);
    for (int head = 0; head < s.heads; ++head) {
      float* rotated = input_.q + (row * s.heads + head) * (s.nope + s.rope) + s.nope;
      turn.rotate(rotated, rotated);
    }
    const int64_t slot = slots_[size_t(row)];
    if (slot < 0) continue;
    const float* from = input_.latent + row * input_.latent_stride;
    rms_norm(from, s.kv_lora, input_.norm, latent.data());
    turn.rotate(from + s.kv_lora, latent.data() + s.kv_lora);
    if (input_.pages.bf16) {
      round_to_bf16(latent.data(), s.latent, static_cast<uint16_t*>(input_.out) + slot * s.latent);
    } else {
      std::memcpy(static_cast<float*>(input_.out) + slot * s.latent, latent.data(), latent.size() * sizeof(float));
    }
  }
}

}  // namespace k2
