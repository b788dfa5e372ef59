// The computations of one layer that were submitted and not yet waited for. Thread-safe, and never waits.
#pragma once
#include <array>
#include <memory>
#include <mutex>
#include <utility>

namespace k2 {

class MoeJob;

constexpr int kSlots = 2;

class Slots {
 public:
  using Jobs = std::array<std::shared_ptr<MoeJob>, kSlots>;

  // Holds a slot while its job is being made, so that nobody else takes it; frees it again unless it was filled.
  class Reservation {
   public:
    // ArgumentError unless the slot exists and is free.
    Reservation(Slots& slots, int slot);
    ~Reservation();
    Reservation(const Reservation&) = delete;
    Reservation& operator=(const Reservation&) = delete;

    void fill(std::shared_ptr<MoeJob> job);

   private:
    Slots& slots_;
    const int slot_;
  };

  // ArgumentError unless the slot exists and holds a job.
  std::shared_ptr<MoeJob> in_flight(int slot) const;

  // Frees the slot if it still holds this job: another thread may have waited for it too, and used the slot again.
  void release(int slot, const std::shared_ptr<MoeJob>& job);

  // Takes all jobs out.
  Jobs take();

  // Forgets all jobs without the lock and without touching them, for a forked child.
  void leak() { static_cast<void>(new Jobs(std::move(jobs_))); }

 private:
  mutable std::mutex mutex_;
  Jobs jobs_;
  std::array<bool, kSlots> reserved_{};
};

}  // namespace k2
