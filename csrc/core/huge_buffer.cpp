#include "core/huge_buffer.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstring>
#include <utility>
#include <vector>

#include "core/error.h"

namespace k2 {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr int kBind = 2;  // MPOL_BIND in the kernel's interface: no page from elsewhere, the page cache gives way

// Pages of this range that are touched from now on come from `node` alone. False if the system refuses: it has no such
// node, this process may not use it, or a container forbids the call.
bool bind_to_node(void* memory, size_t bytes, int node) {
#if defined(SYS_mbind)
  constexpr int kBits = sizeof(unsigned long) * CHAR_BIT;
  if (node < 0) return false;
  std::vector<unsigned long> mask(size_t(node) / kBits + 1);
  mask[size_t(node) / kBits] = 1UL << (node % kBits);
  // The kernel reads one bit less than it is told.
  return syscall(SYS_mbind, memory, bytes, kBind, mask.data(), mask.size() * kBits + 1, 0) == 0;
#else
  static_cast<void>(memory), static_cast<void>(bytes), static_cast<void>(node);
  return false;
#endif
}

}  // namespace

HugeBuffer::HugeBuffer(size_t bytes, int node) : bytes_(bytes) {
  if (bytes == 0) return;
  // Small buffers would waste most of a huge page: they get plain pages, which are aligned well enough.
  const bool huge = bytes >= kHugePage;
  mapping_bytes_ = huge ? (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage : bytes;
  mapping_ = mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    throw MemoryError(text("memory: expected ", mapping_bytes_, " bytes, got ", std::strerror(errno)));
  }
  const uintptr_t start = reinterpret_cast<uintptr_t>(mapping_);
  const uintptr_t aligned = huge ? (start + kHugePage - 1) / kHugePage * kHugePage : start;
  data_ = reinterpret_cast<uint8_t*>(aligned);
  // Best effort: without huge pages everything works, up to a quarter slower with several read streams.
  if (huge) static_cast<void>(madvise(data_, mapping_bytes_ - (aligned - start), MADV_HUGEPAGE));
  if (node != kAnyNode) bound_ = bind_to_node(mapping_, mapping_bytes_, node);
}

HugeBuffer::~HugeBuffer() { release(); }

HugeBuffer::HugeBuffer(HugeBuffer&& other) noexcept { *this = std::move(other); }

HugeBuffer& HugeBuffer::operator=(HugeBuffer&& other) noexcept {
  if (this != &other) {
    release();
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    mapping_ = std::exchange(other.mapping_, nullptr);
    mapping_bytes_ = std::exchange(other.mapping_bytes_, 0);
    bound_ = std::exchange(other.bound_, true);
  }
  return *this;
}

void HugeBuffer::release() {
  if (mapping_) munmap(mapping_, mapping_bytes_);
  data_ = nullptr;
  mapping_ = nullptr;
  bytes_ = mapping_bytes_ = 0;
}

}  // namespace k2
