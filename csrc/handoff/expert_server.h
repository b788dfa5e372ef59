// The thread that serves a mailbox: it watches the request flags, starts the experts and publishes their replies.
//
// It spins while something happens and for 50 us more, if there are CPUs for it, and then sleeps. A thread that posts
// wakes it (`wake`). A GPU cannot: while one may post, the server is kept awake and looks at the flags every 50 us.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "cpu/gate.h"
#include "cpu/thread_pool.h"
#include "handoff/mailbox.h"

namespace k2 {

class ExpertServer {
 public:
  // Starts a layer's experts on the pool, reading the input until the job has ended. What it throws is the reply.
  using Start = std::function<std::shared_ptr<Job>(int layer, const MoeInput& input, float* output)>;

  // When a layer's experts computed, in ns of `Clock`.
  struct JobTime {
    int layer, slot, tokens;
    int64_t start, stop;
  };

  // The mailbox and the pool outlive the server; what was posted before is not served. EngineError if the thread cannot
  // be started.
  ExpertServer(ThreadPool& pool, Mailbox& mailbox, Start start);
  ~ExpertServer() { stop(); }
  ExpertServer(const ExpertServer&) = delete;
  ExpertServer& operator=(const ExpertServer&) = delete;

  // After a post by a thread.
  void wake() { requests_.notify(); }
  // While a GPU may post.
  void keep_awake(bool awake);

  // Waits for the reply to what is posted in a slot; false if the deadline passes first. EngineError once it has stopped.
  bool wait_reply(int slot, Deadline deadline);
  // Why a computation failed; behind its reply.
  const std::string& failure(int slot) const { return slots_[size_t(slot)].failure; }

  // The layer and the reason of the first failure since the last call, for an accelerator that reads no reasons.
  struct Failure {
    int layer;
    std::string reason;
  };
  std::optional<Failure> take_failure();

  // Gives up what is posted in a slot and waits until nothing of it is in flight; false if the deadline passes first.
  bool give_up(int slot, Deadline deadline);

  // Keeps the times of computations from now on, or no longer; `take_times` hands them over.
  void keep_times(bool keep) { keeps_times_.store(keep); }
  std::vector<JobTime> take_times();

  // Cancels what is in flight, answers it and ends the thread; takers get an error. May be called again, by any thread.
  // In a forked child, where the thread does not exist, the server is leaked, for its locks may be held.
  void stop();
  bool forked() const { return pool_.forked(); }

 private:
  struct Slot {
    std::atomic<uint32_t> served{0};    // the last ticket that was answered
    std::atomic<uint32_t> given_up{0};  // the last ticket that nobody waits for
    // The server's own:
    uint32_t ticket = 0;
    std::shared_ptr<Job> job;  // none while nothing is in flight
    uint64_t order = 0;        // in which jobs were started
    JobTime time{};
    std::string failure;
  };

  void serve();
  bool advance(int slot);
  bool begin(int slot);
  void end(Slot& slot, int number);
  void answer(Slot& slot, int number, ReplyStatus status);
  void fail(Slot& slot);
  void record(JobTime time);
  void rest(Clock::time_point moved);
  bool something_to_do() const;
  const Job* next_to_end() const;
  // Giving up the last post gives up what was posted before it: after a `release`, that may still compute.
  bool unwanted(int slot) const {
    return stopping_.load() || slots_[size_t(slot)].given_up.load() == mailbox_.posted(slot);
  }

  ThreadPool& pool_;
  Mailbox& mailbox_;
  Start start_;  // the server's own, while it runs
  std::chrono::nanoseconds spin_;
  std::array<Slot, kMailboxSlots> slots_;
  uint64_t started_ = 0;
  int64_t last_stop_ = 0;
  Gate requests_;  // the server: requests, and what else it is told
  Gate replies_;
  std::atomic<bool> awake_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> stopped_{false};
  std::atomic<bool> keeps_times_{false};
  std::mutex record_mutex_;
  std::vector<JobTime> times_;
  std::optional<Failure> first_failure_;
  std::mutex join_mutex_;
  std::thread thread_;
};

// Leaks the server in a forked child.
struct EndServer {
  void operator()(ExpertServer* server) const {
    if (!server->forked()) delete server;
  }
};
using ExpertServerPointer = std::unique_ptr<ExpertServer, EndServer>;

}  // namespace k2
