#include "core/page_count.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <fstream>
#include <string>

namespace k2 {

std::vector<MappedRange> parse_smaps(std::istream& text, uintptr_t first, uintptr_t last) {
  std::vector<MappedRange> ranges;
  bool inside = false;
  for (std::string line; std::getline(text, line);) {
    MappedRange range;
    size_t kib = 0;
    if (std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR " ", &range.first, &range.last) == 2) {
      if (range.first >= last) break;  // they ascend
      inside = range.last > first;
      if (inside) ranges.push_back(range);
    } else if (inside && std::sscanf(line.c_str(), "Rss: %zu kB", &kib) == 1) {
      ranges.back().resident = kib * 1024;
    } else if (inside && std::sscanf(line.c_str(), "AnonHugePages: %zu kB", &kib) == 1) {
      ranges.back().huge = kib * 1024;
    }
  }
  return ranges;
}

PageCount count_pages(const HugeBuffer& buffer) {
  PageCount count;
  if (buffer.bytes() == 0) return count;
  const uintptr_t first = reinterpret_cast<uintptr_t>(buffer.data()), last = first + buffer.bytes();
  std::ifstream smaps("/proc/self/smaps");
  for (const MappedRange& range : parse_smaps(smaps, first, last)) {
    const size_t inside = std::min(range.last, last) - std::max(range.first, first);
    const double part = double(inside) / double(range.last - range.first);
    count.resident += size_t(part * double(range.resident));
    count.huge += size_t(part * double(range.huge));
  }
  return count;
}

}  // namespace k2
