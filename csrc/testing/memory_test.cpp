// Buffers: what is asked of the system, and what is found out about what it gave.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>
#include <sstream>
#include <string>

#include "core/error.h"
#include "core/page_count.h"
#include "testing/check.h"

namespace k2 {
namespace {

constexpr size_t kMiB = size_t(1) << 20;

const char* const kSmaps =
    "1000-3000 rw-p 00000000 00:00 0 \n"
    "Size:                  8 kB\n"
    "Rss:                   4 kB\n"
    "AnonHugePages:         0 kB\n"
    "200000-600000 rw-p 00000000 00:00 0                   [anon: weights]\n"
    "Size:               4096 kB\n"
    "Rss:                3072 kB\n"
    "Pss:                3072 kB\n"
    "AnonHugePages:      2048 kB\n"
    "VmFlags: rd wr mr mw me ac sd hg \n"
    "600000-800000 r--p 00000000 08:01 77                  /usr/lib/some thing.so\n"
    "Rss:                 100 kB\n"
    "7ffd0000-7ffe0000 rw-p 00000000 00:00 0               [stack]\n"
    "Rss:                  12 kB\n";

std::vector<MappedRange> parse(uintptr_t first, uintptr_t last, const std::string& text = kSmaps) {
  std::istringstream stream(text);
  return parse_smaps(stream, first, last);
}

void smaps_are_read_where_the_range_overlaps() {
  const std::vector<MappedRange> all = parse(0, ~uintptr_t(0));
  K2_EXPECT(all.size() == 4);
  K2_EXPECT(all[1].first == 0x200000 && all[1].last == 0x600000);
  K2_EXPECT(all[1].resident == 3072 * 1024 && all[1].huge == 2048 * 1024);
  K2_EXPECT(all[2].resident == 100 * 1024 && all[2].huge == 0);
  K2_EXPECT(parse(0x3000, 0x200000).empty());
  K2_EXPECT(parse(0x5fffff, 0x600001).size() == 2);
  K2_EXPECT(parse(0x600000, 0x600001).size() == 1);
  K2_EXPECT(parse(0, 1 << 20, "").empty());
  const std::vector<MappedRange> odd = parse(0, 1 << 20, "Rss: 7 kB\nnonsense\n1000-2000\n");
  K2_EXPECT(odd.size() == 1 && odd[0].resident == 0);  // what stands before the first mapping belongs to none
}

void pages_are_counted_when_they_are_touched() {
  HugeBuffer buffer(8 * kMiB);
  K2_EXPECT(reinterpret_cast<uintptr_t>(buffer.data()) % (2 * kMiB) == 0);
  std::memset(buffer.data(), 1, buffer.bytes());
  const PageCount count = count_pages(buffer);
  K2_EXPECT(count.huge <= count.resident && count.resident <= buffer.bytes());
  K2_EXPECT(count.resident > 0);
  madvise(buffer.data(), buffer.bytes(), MADV_NOHUGEPAGE);  // now a mapping of its own, so counted exactly
  K2_EXPECT(count_pages(buffer).resident == buffer.bytes());
  madvise(buffer.data(), buffer.bytes(), MADV_DONTNEED);
  std::memset(buffer.data(), 1, buffer.bytes());
  K2_EXPECT(count_pages(buffer).huge == 0 && count_pages(buffer).resident == buffer.bytes());
}

void an_empty_buffer_counts_nothing() {
  const PageCount count = count_pages(HugeBuffer());
  K2_EXPECT(count.resident == 0 && count.huge == 0 && HugeBuffer().bound());
}

constexpr int kBind = 2;  // MPOL_BIND

struct Policy {
  int mode;
  unsigned long nodes;  // of the first 64
};

// What the kernel says about the memory policy at this address.
Policy policy_of(const uint8_t* address) {
  constexpr unsigned long kAtAddress = 2;  // MPOL_F_ADDR
  unsigned long nodes[16] = {};            // as many as the kernel may know
  int mode = -1;
  K2_EXPECT(syscall(SYS_get_mempolicy, &mode, nodes, 8 * sizeof(nodes), address, kAtAddress) == 0);
  return {mode, nodes[0]};
}

// The node that the page at this address lies on.
int node_of(const uint8_t* address) {
  constexpr unsigned long kNode = 1, kAtAddress = 2;  // MPOL_F_NODE, MPOL_F_ADDR
  int node = -1;
  K2_EXPECT(syscall(SYS_get_mempolicy, &node, nullptr, 0, address, kNode | kAtAddress) == 0);
  return node;
}

void memory_is_bound_where_the_system_allows_it() {
  const HugeBuffer anywhere(4 * kMiB);
  K2_EXPECT(anywhere.bound());
  const HugeBuffer nowhere(4 * kMiB, 100000);  // no such node: the memory is there all the same
  K2_EXPECT(!nowhere.bound());
  std::memset(nowhere.data(), 1, nowhere.bytes());
  HugeBuffer first(4 * kMiB, 0);  // may be refused in a container
  std::memset(first.data(), 1, first.bytes());
  const bool bound = first.bound();
  if (bound) {
    for (const uint8_t* page : {first.data(), first.data() + first.bytes() - 1}) {
      K2_EXPECT(policy_of(page).mode == kBind && policy_of(page).nodes == 1);
      K2_EXPECT(node_of(page) == 0);
    }
    K2_EXPECT(policy_of(anywhere.data()).mode != kBind && policy_of(nowhere.data()).mode != kBind);
  }
  const HugeBuffer moved = std::move(first);
  K2_EXPECT(moved.bound() == bound && moved.data()[4 * kMiB - 1] == 1);
}

void too_much_memory_is_an_error() {
  bool refused = false;
  try {
    const HugeBuffer buffer(size_t(1) << 60);
  } catch (const MemoryError&) {
    refused = true;
  }
  K2_EXPECT(refused);
}

}  // namespace
}  // namespace k2

int main() {
  k2::smaps_are_read_where_the_range_overlaps();
  k2::pages_are_counted_when_they_are_touched();
  k2::an_empty_buffer_counts_nothing();
  k2::memory_is_bound_where_the_system_allows_it();
  k2::too_much_memory_is_an_error();
  std::puts("ok");
}
