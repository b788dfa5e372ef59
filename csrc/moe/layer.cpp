#include "moe/layer.h"

namespace k2 {

std::shared_ptr<MoeJob> Layer::start(const MoeInput& input, float* output) {
  runtime_->pool.check_process();
  auto job = std::make_shared<MoeJob>(runtime_->pool, runtime_->table, runtime_->tuning(), experts_, runtime_->workspaces,
                                      input, output);
  runtime_->pool.submit(*job);
  return job;
}

void Layer::submit(int slot, const MoeInput& input) {
  runtime_->pool.check_process();
  Slots::Reservation reserved(slots_, slot);
  reserved.fill(start(input));
}

std::shared_ptr<MoeJob> Layer::in_flight(int slot) const {
  runtime_->pool.check_process();
  return slots_.in_flight(slot);
}

void Layer::release(int slot, const std::shared_ptr<MoeJob>& job) {
  if (!runtime_->pool.forked()) slots_.release(slot, job);
}

void Layer::end() {
  if (runtime_->pool.forked()) return slots_.leak();
  const Slots::Jobs jobs = slots_.take();
  for (const std::shared_ptr<MoeJob>& job : jobs) {
    if (!job) continue;
    job->cancel();
    runtime_->pool.finish(*job);
  }
}

}  // namespace k2
