// How the workers of a pool are spread over NUMA nodes. Plain facts: whoever made them has looked at the machine.
#pragma once
#include <vector>

#include "core/numa.h"

namespace k2 {

struct NodeWorkers {
  int workers = 1;
  int memory_node = kAnyNode;          // the kernel's number of the node; kAnyNode: its memory may lie anywhere
  std::vector<std::vector<int>> cpus;  // where each worker may run; empty: wherever the process may
};

using PoolLayout = std::vector<NodeWorkers>;

// Numbers the workers node by node: each node's workers follow each other.
class WorkerMap {
 public:
  // ArgumentError unless there are 1..4096 workers, at least one on each node, and CPUs for all workers of a node or none.
  explicit WorkerMap(const PoolLayout& layout);

  int workers() const { return first_.back(); }
  int nodes() const { return int(first_.size()) - 1; }
  int node(int worker) const { return node_[worker]; }
  int first(int node) const { return first_[node]; }
  int workers(int node) const { return first_[node + 1] - first_[node]; }

 private:
  std::vector<int> first_;  // [nodes + 1] first worker of each node
  std::vector<int> node_;   // [workers]
};

}  // namespace k2
