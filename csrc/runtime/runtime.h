// What the layers of one engine share, experts, dense layers and attention.
#pragma once
#include <mutex>
#include <string>
#include <vector>

#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"
#include "runtime/workspace.h"

namespace k2 {

class Runtime {
 public:
  Runtime(const std::string& isa, Numerics numerics, const PoolLayout& layout);
  Runtime(const std::string& isa, Numerics numerics, int threads)
      : Runtime(isa, numerics, PoolLayout{{threads, kAnyNode, {}}}) {}

  const KernelTable& table;
  const std::vector<int> memory_nodes;  // of the pool's nodes
  WorkspaceStore workspaces;
  ThreadPool pool;

  // For computations that start from now on. Thread-safe.
  Tuning tuning() const {
    const std::lock_guard lock(tuning_mutex_);
    return tuning_;
  }
  void tune(const Tuning& tuning) {
    const std::lock_guard lock(tuning_mutex_);
    tuning_ = tuning;
  }

 private:
  mutable std::mutex tuning_mutex_;
  Tuning tuning_;  // the table's, until it is tuned
};

}  // namespace k2
