// What the kernel says about this process's memory, in /proc/self/smaps: whether huge pages really came.
#pragma once
#include <cstddef>
#include <cstdint>
#include <iosfwd>
#include <vector>

#include "core/huge_buffer.h"

namespace k2 {

// One mapping: its address range, the bytes of it that are in memory, and those of them on huge pages.
struct MappedRange {
  uintptr_t first = 0;
  uintptr_t last = 0;
  size_t resident = 0;
  size_t huge = 0;
};

// The mappings that overlap [first, last), from text in the form of /proc/self/smaps.
std::vector<MappedRange> parse_smaps(std::istream& text, uintptr_t first, uintptr_t last);

struct PageCount {
  size_t resident = 0;
  size_t huge = 0;
};

// Bytes of the buffer that are in memory now and, of these, those on huge pages; nothing where the kernel does not say.
// The kernel joins neighbouring buffers into one mapping: they are counted in proportion. Walks the page tables of the
// whole process.
PageCount count_pages(const HugeBuffer& buffer);

}  // namespace k2
