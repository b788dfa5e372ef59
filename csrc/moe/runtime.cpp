#include "moe/runtime.h"

#include "core/error.h"
#include "kernels/kernel_list.h"

namespace k2 {

Runtime::Runtime(const std::string& isa, Numerics numerics, int threads)
    : table(find_table(isa, numerics)), pool(threads) {}

std::shared_ptr<MoeJob> Layer::start(const MoeInput& input) {
  auto job = std::make_shared<MoeJob>(runtime_->pool, runtime_->table, experts_, runtime_->workspaces, input);
  runtime_->pool.submit(*job);
  return job;
}

void Layer::check_free(int slot) const {
  check_argument(slot >= 0 && slot < kSlots, "slot", text("0..", kSlots - 1), slot);
  check_argument(!slots_[slot], "slot", "a free one", text("slot ", slot, ", which is in flight"));
}

std::shared_ptr<MoeJob> Layer::in_flight(int slot) const {
  check_argument(slot >= 0 && slot < kSlots, "slot", text("0..", kSlots - 1), slot);
  check_argument(bool(slots_[slot]), "slot", "one in flight", text("slot ", slot, ", where nothing was submitted"));
  return slots_[slot];
}

void Layer::end(const Jobs& jobs) {
  for (const std::shared_ptr<MoeJob>& job : jobs) {
    if (!job) continue;
    job->cancel();
    runtime_->pool.finish(*job);
  }
}

}  // namespace k2
