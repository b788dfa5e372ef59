// Scratch memory of one computation, kept for the next one.
#pragma once
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "core/huge_buffer.h"

namespace k2 {

struct Workspace {
  HugeBuffer hidden;     // [T, H] fp32 or bf16: the copied input
  HugeBuffer output;     // [T, H] fp32
  HugeBuffer packed;     // [chunk, packed hidden]
  HugeBuffer activated;  // [chunk * K, packed intermediate]

  size_t bytes() const { return hidden.bytes() + output.bytes() + packed.bytes() + activated.bytes(); }
};

// Makes `buffer` at least that large; what it held is lost when it grows.
inline void reserve(HugeBuffer& buffer, size_t bytes) {
  if (buffer.bytes() < bytes) {
    buffer = HugeBuffer();
    buffer = HugeBuffer(bytes);
  }
}

// Workspaces that nobody uses at the moment. Thread-safe.
class WorkspaceStore {
 public:
  std::unique_ptr<Workspace> take() {
    std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique<Workspace>();
    std::unique_ptr<Workspace> workspace = std::move(free_.back());
    free_.pop_back();
    return workspace;
  }

  // Keeps decode-sized workspaces; the large ones of a long prefill go back to the system.
  void give(std::unique_ptr<Workspace> workspace) {
    if (workspace->bytes() > kKeepBytes) return;
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(workspace));
  }

 private:
  static constexpr size_t kKeepBytes = size_t(64) << 20;

  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

}  // namespace k2
