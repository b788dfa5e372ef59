// Scratch memory of one computation, kept for the next one.
#pragma once
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "core/huge_buffer.h"

namespace k2 {

// Of one node's part: touched first by the node's workers, so it lies on their node.
struct PartMemory {
  HugeBuffer output;     // [T, H] fp32 partial sums, unless the caller has the place for them
  HugeBuffer packed;     // [chunk, packed hidden]
  HugeBuffer activated;  // [chunk * K, packed slice of the intermediate]
  HugeBuffer scratch;    // [worker, scratch of a call]

  size_t bytes() const { return output.bytes() + packed.bytes() + activated.bytes() + scratch.bytes(); }
};

struct Workspace {
  HugeBuffer hidden;  // [T, H] fp32 or bf16: the input, where it is copied
  std::vector<PartMemory> parts;

  size_t bytes() const {
    size_t sum = hidden.bytes();
    for (const PartMemory& part : parts) sum += part.bytes();
    return sum;
  }
};

// Workspaces that nobody uses at the moment, all of one number of parts. Thread-safe.
class WorkspaceStore {
 public:
  // For chunks of so many tokens.
  explicit WorkspaceStore(int chunk_tokens = 1024) : keep_bytes_(kKeepBytes * size_t(chunk_tokens)) {}

  std::unique_ptr<Workspace> take(int parts) {
    std::lock_guard lock(mutex_);
    if (free_.empty()) {
      auto workspace = std::make_unique<Workspace>();
      workspace->parts.resize(size_t(parts));
      return workspace;
    }
    std::unique_ptr<Workspace> workspace = std::move(free_.back());
    free_.pop_back();
    return workspace;
  }

  // Keeps what a chunk of tokens needs on each node, for the next layer; what more a long prefill took goes back to the
  // system.
  void give(std::unique_ptr<Workspace> workspace) {
    if (workspace->bytes() > keep_bytes_ * workspace->parts.size()) return;
    std::lock_guard lock(mutex_);
    free_.push_back(std::move(workspace));
  }

 private:
  static constexpr size_t kKeepBytes = size_t(64) << 10;  // per node and token

  const size_t keep_bytes_;  // per node
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

}  // namespace k2
