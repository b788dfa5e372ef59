// Waiting for a condition on atomics: spin for a moment, then sleep.
//
// Protocol: whoever changes an atomic that a waiter's condition reads calls `notify` afterwards. Both the change and
// the condition use sequentially consistent operations (the default). Then either the changer sees the waiter in
// `sleepers_` and wakes it, or the waiter's check, made after it entered `sleepers_`, sees the change.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace k2 {

using Clock = std::chrono::steady_clock;
using Deadline = std::optional<Clock::time_point>;

inline void relax_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Gate {
 public:
  // Returns true once `ready()` is, false if the deadline passes first.
  template <class Ready>
  bool wait(Ready ready, std::chrono::nanoseconds spin, Deadline deadline = std::nullopt) {
    if (spin_until(ready, spin)) return true;
    std::unique_lock lock(mutex_);
    sleepers_.fetch_add(1);
    bool done = false;
    if (deadline) {
      done = changed_.wait_until(lock, *deadline, ready);
    } else {
      changed_.wait(lock, ready);
      done = true;
    }
    sleepers_.fetch_sub(1);
    return done;
  }

  // Costs one load while nobody sleeps.
  void notify() {
    if (sleepers_.load() == 0) return;
    {
      std::lock_guard lock(mutex_);
    }  // a waiter between its check and its sleep is let into the sleep
    changed_.notify_all();
  }

 private:
  template <class Ready>
  static bool spin_until(Ready& ready, std::chrono::nanoseconds spin) {
    if (ready()) return true;
    if (spin.count() == 0) return false;
    const Clock::time_point end = Clock::now() + spin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (ready()) return true;
        relax_cpu();
      }
    } while (Clock::now() < end);
    return ready();
  }

  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

}  // namespace k2
