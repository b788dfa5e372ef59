// The experts' kernels of every instruction set, for each of the numerics that it has kernels for.
#pragma once
#include <string>

#include "kernels/isa_list.h"
#include "kernels/kernel_table.h"

namespace k2 {

// Null where there are no such kernels, or this binary lacks them.
const KernelTable* kernel_table(Isa isa, Numerics numerics);

// "exact", "fast", "bf16".
const char* numerics_name(Numerics numerics);
// ArgumentError if there are none of that name.
Numerics find_numerics(const std::string& name);

// The kernels of an instruction set for these numerics. ArgumentError if the instruction set is unknown, has none, was
// not built, or needs what this machine lacks.
const KernelTable& find_table(const std::string& isa, Numerics numerics);

}  // namespace k2
