// The weights of one MoE layer in their final place.
//
// Each NUMA node holds a slice of the intermediate channels of every expert, in memory of its own: the row blocks of w13
// and the groups of w2 that belong to those channels, experts one after the other, w13 before w2. There may be room for
// some of the experts alone, where others are computed elsewhere.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/page_count.h"
#include "kernels/l32.h"
#include "kernels/pack_list.h"
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

// The slices that `nodes` nodes have of `groups` groups of 32 intermediate channels: as equal as they go, in the order of
// the nodes. It depends on the number of nodes alone, so that the order of the sums does too.
std::vector<GroupRange> slice_channels(int groups, int nodes);

class ExpertLayer {
 public:
  // `memory_nodes`: for each node the NUMA node that its memory is bound to, or kAnyNode. `room`: for so many experts.
  ExpertLayer(const LayerShape& shape, const std::vector<int>& memory_nodes, int room, const PackTable& packer);
  explicit ExpertLayer(const LayerShape& shape, const std::vector<int>& memory_nodes = {kAnyNode})
      : ExpertLayer(shape, memory_nodes, shape.experts, portable::pack_table) {}

  const LayerShape& shape() const { return shape_; }
  size_t bytes() const;
  int nodes() const { return int(slices_.size()); }
  GroupRange channels(int node) const { return slices_[node].channels; }
  // The memory of each node, for first_touch.
  std::vector<const HugeBuffer*> buffers() const;
  // Whether each slice is on the NUMA node that was asked for; true where none was.
  bool bound() const;
  // Of all slices; walks the page tables of the process.
  PageCount count_pages() const;

  // Thread-safe for different experts; runs on the calling thread. ArgumentError, WeightError.
  void pack(int expert, const PackedMatrix& gate, const PackedMatrix& up, const PackedMatrix& down);
  // The same in pieces, for a reader that holds a few rows at a time: `begin`, every row of each matrix once, `finish`.
  // Rows and first rows are multiples of 16 in gate and up, of 32 in down. ArgumentError without room for one more.
  void begin(int expert);
  void pack_gate_up(int expert, const PackedMatrix& gate, const PackedMatrix& up);
  void pack_down(int expert, const PackedMatrix& down);
  void finish(int expert) { loaded_[expert].store(true, std::memory_order_release); }
  // The inverse, for verification. ArgumentError if the expert was not packed.
  void unpack(int expert, const MutablePackedMatrix& gate, const MutablePackedMatrix& up,
              const MutablePackedMatrix& down) const;

  // The expert in layout L32 as one node would hold it: w13 [I/16, H/32, 576] and w2 [H/32, I/32, 576]. ArgumentError.
  void copy_l32(int expert, uint8_t* w13_out, uint8_t* w2_out) const;

  // Takes an expert in the form that `copy_l32` writes, with its checksum. As `pack` for threads and errors.
  void store(int expert, const uint8_t* w13, const uint8_t* w2, uint64_t checksum);
  // The same, into the place of a packed one, which is gone then. Nothing may compute meanwhile. ArgumentError unless
  // `old` is here and `now` is not.
  void replace(int old, int now, const uint8_t* w13, const uint8_t* w2, uint64_t checksum);

  // Of the expert's blocks as they were packed, and as they are in memory now (moe/l32_digest.h). ArgumentError if the
  // expert was not packed.
  uint64_t checksum(int expert) const;
  uint64_t memory_checksum(int expert) const;

  // ArgumentError unless the expert exists and was packed.
  void check_loaded(int expert) const;
  bool loaded(int expert) const { return loaded_[expert].load(std::memory_order_acquire); }
  // A node's slice: w13 [2 * channels, H/32, 576] and w2 [H/32, channels, 576], where channels counts groups of 32.
  const uint8_t* w13(int expert, int node = 0) const { return place(slices_[node], expert); }
  const uint8_t* w2(int expert, int node = 0) const { return place(slices_[node], expert) + slices_[node].w13_bytes; }

 private:
  struct Slice {
    GroupRange channels;
    int64_t w13_bytes;
    int64_t expert_bytes;
    HugeBuffer memory;
  };

  void check_expert(int expert) const;
  uint8_t* place(const Slice& slice, int expert) const {
    return slice.memory.data() + places_[expert].load(std::memory_order_relaxed) * slice.expert_bytes;
  }
  // Calls visit(bytes here, where they are in w13 or w2 as one node would hold them, which of the two, how many).
  template <class Visit>
  void each_run(int expert, Visit visit) const;

  const LayerShape shape_;
  const int room_;
  const PackTable& packer_;
  std::vector<Slice> slices_;
  std::unique_ptr<std::atomic<int>[]> places_;  // among the experts in memory; of the others -1
  std::atomic<int> taken_{0};                   // places
  std::unique_ptr<uint64_t[]> checksums_;
  std::unique_ptr<std::atomic<bool>[]> loaded_;
};

}  // namespace k2
