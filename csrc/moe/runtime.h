// What the layers of one engine share, and one layer with its computations in flight.
#pragma once
#include <array>
#include <memory>
#include <string>
#include <utility>

#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"
#include "moe/expert_layer.h"
#include "moe/moe_job.h"
#include "moe/workspace.h"

namespace k2 {

struct Runtime {
  Runtime(const std::string& isa, Numerics numerics, int threads);

  const KernelTable& table;
  WorkspaceStore workspaces;
  ThreadPool pool;
};

constexpr int kSlots = 2;

class Layer {
 public:
  Layer(std::shared_ptr<Runtime> runtime, const LayerShape& shape) : runtime_(std::move(runtime)), experts_(shape) {}
  ~Layer() { end(take()); }

  ExpertLayer& experts() { return experts_; }
  Runtime& runtime() { return *runtime_; }

  // A started computation. EngineError, ArgumentError as MoeJob.
  std::shared_ptr<MoeJob> start(const MoeInput& input);

  // ArgumentError unless the slot exists and is free, or in flight.
  void check_free(int slot) const;
  std::shared_ptr<MoeJob> in_flight(int slot) const;

  void keep(int slot, std::shared_ptr<MoeJob> job) { slots_[slot] = std::move(job); }
  void release(int slot) { slots_[slot].reset(); }

  // Takes what is in flight out of the slots; as fast as the other calls on slots, and like them under the caller's lock.
  using Jobs = std::array<std::shared_ptr<MoeJob>, kSlots>;
  Jobs take() { return std::exchange(slots_, {}); }
  // Cancels jobs that were taken and waits for them to end. Needs no lock.
  void end(const Jobs& jobs);

 private:
  std::shared_ptr<Runtime> runtime_;
  ExpertLayer experts_;
  Jobs slots_;
};

}  // namespace k2
