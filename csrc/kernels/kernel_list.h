// The instruction sets that hybrid-k2 knows, best first, whether or not this binary and this CPU have them.
#pragma once
#include <cstdint>
#include <span>
#include <string>

#include "kernels/kernel_table.h"

namespace k2 {

struct KernelEntry {
  const char* name;
  uint32_t required;         // Feature bits
  const KernelTable* table;  // null where this binary was built without it
};

// Best first; the last one, "portable", is always built and needs nothing.
std::span<const KernelEntry> kernel_list();

// Feature bits that the entry needs and this machine lacks.
uint32_t missing_features(const KernelEntry& entry);

// The table of that name. ArgumentError if it is unknown, not built, or needs what this machine lacks.
const KernelTable& find_table(const std::string& name);

}  // namespace k2
