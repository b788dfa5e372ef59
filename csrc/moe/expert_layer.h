// The weights of one MoE layer in their final place: one allocation, experts one after the other, w13 before w2.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "core/huge_buffer.h"
#include "kernels/l32.h"
#include "moe/l32_pack.h"

namespace k2 {

struct LayerShape {
  int hidden;             // H, a multiple of 32
  int intermediate;       // I, a multiple of 32
  int experts;            // E
  int experts_per_token;  // K

  // ArgumentError naming the size that does not fit.
  void check() const;

  int hidden_groups() const { return hidden / kGroup; }
  int intermediate_groups() const { return intermediate / kGroup; }
  int64_t w13_bytes() const { return int64_t(intermediate / kHalfBlock) * hidden_groups() * kBlockBytes; }
  int64_t w2_bytes() const { return int64_t(hidden_groups()) * intermediate_groups() * kBlockBytes; }
  int64_t expert_bytes() const { return w13_bytes() + w2_bytes(); }
};

class ExpertLayer {
 public:
  explicit ExpertLayer(const LayerShape& shape);

  const LayerShape& shape() const { return shape_; }
  size_t bytes() const { return memory_.bytes(); }

  // Thread-safe for different experts; runs on the calling thread. ArgumentError, WeightError.
  void pack(int expert, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down);
  // The same in pieces, for a reader that holds a few rows at a time: `begin`, every row of each matrix once, `finish`.
  // Rows and first rows are multiples of 16 in gate and up, of 32 in down.
  void begin(int expert);
  void pack_gate_up(int expert, const PackedMatrix& gate, const PackedMatrix& up);
  void pack_down(int expert, const PackedMatrix& down);
  void finish(int expert) { loaded_[expert].store(true, std::memory_order_release); }
  // The inverse, for verification. ArgumentError if the expert was not packed.
  void unpack(int expert, const MutablePackedMatrix& gate, const MutablePackedMatrix& up,
              const MutablePackedMatrix& down) const;

  // Of the expert's blocks as they were packed, and as they are in memory now (moe/l32_digest.h). ArgumentError if the
  // expert was not packed.
  uint64_t checksum(int expert) const;
  uint64_t memory_checksum(int expert) const;

  // ArgumentError unless the expert exists and was packed.
  void check_loaded(int expert) const;
  bool loaded(int expert) const { return loaded_[expert].load(std::memory_order_acquire); }
  const uint8_t* w13(int expert) const { return memory_.data() + expert * shape_.expert_bytes(); }
  const uint8_t* w2(int expert) const { return w13(expert) + shape_.w13_bytes(); }

 private:
  uint8_t* place(int expert) { return memory_.data() + expert * shape_.expert_bytes(); }

  const LayerShape shape_;
  HugeBuffer memory_;
  std::unique_ptr<uint64_t[]> checksums_;
  std::unique_ptr<std::atomic<bool>[]> loaded_;
};

}  // namespace k2
