// Which attention kernels go with an instruction set.
#pragma once
#include <string>

#include "kernels/attention.h"

namespace k2 {

// The best ones that are built for the instruction set of this name, which this CPU must support. ArgumentError if there
// is none of that name.
const AttentionTable& find_attention(const std::string& isa);

}  // namespace k2
