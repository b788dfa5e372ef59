// The instruction sets that hybrid-k2 knows, whether or not this binary and this CPU have them.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace k2 {

// Best first; each includes those behind it.
enum Isa { kAmxBf16Isa, kAvx512Bf16Isa, kAvx512VnniIsa, kAvx2Isa, kPortableIsa, kIsaCount };

const char* isa_name(Isa isa);
// ArgumentError if there is none of that name.
Isa find_isa(const std::string& name);

// Feature bits that the instruction set needs and this machine lacks; none for the portable one.
uint32_t missing_features(Isa isa);

// The kernels that go with an instruction set, which this CPU must support: its own, or those of the next that it includes.
// The portable ones are always built.
template <class Table>
const Table& best_table(const Table* const (&tables)[kIsaCount], Isa isa) {
  size_t index = isa;
  while (!tables[index]) ++index;
  return *tables[index];
}

}  // namespace k2
