// What the layers of one model share for attention: sizes, kernels, scratch memory.
#pragma once
#include <memory>
#include <mutex>
#include <utility>

#include "attention/attention_job.h"
#include "kernels/attention_list.h"
#include "runtime/peak_probe.h"
#include "runtime/runtime.h"

namespace k2 {

// Thread-safe.
class LatentAttention {
 public:
  LatentAttention(std::shared_ptr<Runtime> runtime, const MlaSizes& sizes, float scale)
      : runtime_(std::move(runtime)), table_(find_attention(runtime_->table.name)), sizes_(sizes), scale_(scale) {}

  const MlaSizes& sizes() const { return sizes_; }
  float scale() const { return scale_; }
  const AttentionTable& table() const { return table_; }
  const char* isa() const { return table_.name; }
  Peak peak() const { return {table_.peak, table_.peak_operations}; }
  Runtime& runtime() { return *runtime_; }
  ThreadPool& pool() { return runtime_->pool; }

  // A call that was started. What it points to and the workspace must outlive it.
  std::unique_ptr<AttentionJob> start(AttentionInput input, AttentionWorkspace& workspace) {
    auto job = std::make_unique<AttentionJob>(pool(), table_, sizes_, scale_, std::move(input), workspace);
    pool().submit(*job);
    return job;
  }

  std::unique_ptr<AttentionWorkspace> take_workspace() {
    std::lock_guard lock(mutex_);
    return spare_ ? std::move(spare_) : std::make_unique<AttentionWorkspace>();
  }

  // Keeps one for the next call: of a decode step; the large one of a long chunk goes back to the system.
  void give_workspace(std::unique_ptr<AttentionWorkspace> workspace) {
    if (workspace->bytes() > kKeepBytes) return;
    std::lock_guard lock(mutex_);
    spare_ = std::move(workspace);
  }

 private:
  static constexpr size_t kKeepBytes = size_t(64) << 20;

  std::shared_ptr<Runtime> runtime_;
  const AttentionTable& table_;
  const MlaSizes sizes_;
  const float scale_;
  std::mutex mutex_;
  std::unique_ptr<AttentionWorkspace> spare_;
};

}  // namespace k2
