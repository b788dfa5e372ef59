// Which packer goes with an instruction set.
#pragma once
#include <string>

#include "kernels/pack_table.h"

namespace k2 {

namespace portable {
extern const PackTable pack_table;  // for every CPU
}

// The best one that is built for the instruction set of this name, which this CPU must support. ArgumentError if there is
// none of that name.
const PackTable& find_packer(const std::string& isa);

}  // namespace k2
