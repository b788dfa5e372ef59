// The dense kernels of every instruction set that has its own.
#pragma once
#include <span>
#include <string>

#include "kernels/dense_table.h"

namespace k2 {

struct DenseEntry {
  const char* name;
  uint32_t required;        // Feature bits
  const DenseTable* table;  // null where this binary was built without it
};

// Best first; the last one, "portable", is always built.
std::span<const DenseEntry> dense_list();

// The table of the instruction set that the experts use; for one without dense kernels of its own, the best that the
// machine supports.
const DenseTable& find_dense_table(const std::string& isa);

}  // namespace k2
