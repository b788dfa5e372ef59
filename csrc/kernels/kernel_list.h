// The instruction sets that hybrid-k2 knows, best first, and the numerics that each has kernels for; whether or not this
// binary and this CPU have them.
#pragma once
#include <cstdint>
#include <span>
#include <string>

#include "kernels/kernel_table.h"

namespace k2 {

struct KernelEntry {
  const char* name;
  uint32_t required;                          // Feature bits
  const KernelTable* tables[kNumericsCount];  // null where there are no such kernels, or this binary lacks them
};

// Best first; the last one, "portable", is always built and needs nothing.
std::span<const KernelEntry> kernel_list();

// Feature bits that the entry needs and this machine lacks.
uint32_t missing_features(const KernelEntry& entry);

// "exact", "fast", "bf16".
const char* numerics_name(Numerics numerics);
// ArgumentError if there are none of that name.
Numerics find_numerics(const std::string& name);

// The kernels of an instruction set for these numerics. ArgumentError if the instruction set is unknown, has none, was
// not built, or needs what this machine lacks.
const KernelTable& find_table(const std::string& isa, Numerics numerics);

}  // namespace k2
