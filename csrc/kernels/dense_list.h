// Which dense kernels go with an instruction set.
#pragma once
#include <string>

#include "kernels/dense_table.h"

namespace k2 {

// The best ones that are built for the instruction set of this name, which this CPU must support. ArgumentError if there
// is none of that name.
const DenseTable& find_dense_table(const std::string& isa);

}  // namespace k2
