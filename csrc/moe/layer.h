// The experts of one layer with their computations in flight.
#pragma once
#include <memory>
#include <utility>

#include "cpu/first_touch.h"
#include "moe/expert_layer.h"
#include "moe/moe_job.h"
#include "moe/slots.h"
#include "runtime/runtime.h"

namespace k2 {

// Thread-safe. In a child process after `fork` nothing takes a lock, for other threads may have held it; computing is an
// EngineError there.
class Layer {
 public:
  // `room`: for so many of the experts; all of them without it.
  Layer(std::shared_ptr<Runtime> runtime, const LayerShape& shape) : Layer(std::move(runtime), shape, shape.experts) {}
  Layer(std::shared_ptr<Runtime> runtime, const LayerShape& shape, int room)
      : runtime_(std::move(runtime)), experts_(shape, runtime_->memory_nodes, room, find_packer(runtime_->table.name)) {
    first_touch(runtime_->pool, experts_.buffers());
  }
  ~Layer() { end(); }

  ExpertLayer& experts() { return experts_; }
  Runtime& runtime() { return *runtime_; }

  // A started computation, with or without an output of the caller. EngineError, ArgumentError as MoeJob.
  std::shared_ptr<MoeJob> start(const MoeInput& input, float* output = nullptr);

  // Starts a computation in a slot. ArgumentError as well unless the slot exists and is free.
  void submit(int slot, const MoeInput& input);
  std::shared_ptr<MoeJob> in_flight(int slot) const;
  void release(int slot, const std::shared_ptr<MoeJob>& job);

  // Cancels what is in flight and waits for it to end. In a forked child what was in flight leaks.
  void end();

 private:
  std::shared_ptr<Runtime> runtime_;
  ExpertLayer experts_;
  Slots slots_;
};

}  // namespace k2
