// Memory for weights and scratch: anonymous pages, 2 MiB aligned, huge pages where the system gives them.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/numa.h"

namespace k2 {

class HugeBuffer {
 public:
  HugeBuffer() = default;
  // Zero-filled on first touch. MemoryError if the system refuses the memory. With a `node` its pages come from that
  // NUMA node, if the system allows it: see `bound`.
  explicit HugeBuffer(size_t bytes, int node = kAnyNode);
  ~HugeBuffer();
  HugeBuffer(HugeBuffer&& other) noexcept;
  HugeBuffer& operator=(HugeBuffer&& other) noexcept;
  HugeBuffer(const HugeBuffer&) = delete;
  HugeBuffer& operator=(const HugeBuffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  // Whether the pages come from the node that was asked for; true where none was.
  bool bound() const { return bound_; }

 private:
  void release();

  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  bool bound_ = true;
};

// Makes `buffer` at least that large; what it held is lost when it grows, before the new memory is asked for.
inline void reserve(HugeBuffer& buffer, size_t bytes) {
  if (buffer.bytes() >= bytes) return;
  buffer = HugeBuffer();
  buffer = HugeBuffer(bytes);
}

}  // namespace k2
