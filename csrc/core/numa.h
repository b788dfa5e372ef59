// Numbers of NUMA nodes.
#pragma once

namespace k2 {

constexpr int kAnyNode = -1;  // memory that may lie on any node

}  // namespace k2
