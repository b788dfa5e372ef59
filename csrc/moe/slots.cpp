#include "moe/slots.h"

#include <utility>

#include "core/error.h"

namespace k2 {
namespace {

void check_slot(int slot) { check_argument(slot >= 0 && slot < kSlots, "slot", text("0..", kSlots - 1), slot); }

}  // namespace

Slots::Reservation::Reservation(Slots& slots, int slot) : slots_(slots), slot_(slot) {
  check_slot(slot);
  std::lock_guard lock(slots.mutex_);
  const bool free = !slots.jobs_[slot] && !slots.reserved_[slot];
  check_argument(free, "slot", "a free one", text("slot ", slot, ", which is in flight"));
  slots.reserved_[slot] = true;
}

Slots::Reservation::~Reservation() {
  std::lock_guard lock(slots_.mutex_);
  slots_.reserved_[slot_] = false;
}

void Slots::Reservation::fill(std::shared_ptr<MoeJob> job) {
  std::lock_guard lock(slots_.mutex_);
  slots_.jobs_[slot_] = std::move(job);
}

std::shared_ptr<MoeJob> Slots::in_flight(int slot) const {
  check_slot(slot);
  std::lock_guard lock(mutex_);
  check_argument(bool(jobs_[slot]), "slot", "one in flight", text("slot ", slot, ", where nothing was submitted"));
  return jobs_[slot];
}

void Slots::release(int slot, const std::shared_ptr<MoeJob>& job) {
  std::lock_guard lock(mutex_);
  if (jobs_[slot] == job) jobs_[slot].reset();
}

Slots::Jobs Slots::take() {
  std::lock_guard lock(mutex_);
  return std::exchange(jobs_, {});
}

}  // namespace k2
