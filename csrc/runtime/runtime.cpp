#include "runtime/runtime.h"

#include "kernels/kernel_list.h"

namespace k2 {

namespace {

std::vector<int> nodes_of(const PoolLayout& layout) {
  std::vector<int> nodes;
  for (const NodeWorkers& node : layout) nodes.push_back(node.memory_node);
  return nodes;
}

}  // namespace

Runtime::Runtime(const std::string& isa, Numerics numerics, const PoolLayout& layout)
    : table(find_table(isa, numerics)),
      memory_nodes(nodes_of(layout)),
      workspaces(table.chunk_tokens),
      pool(layout),
      tuning_(table.tuning) {}

}  // namespace k2
