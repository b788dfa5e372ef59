// The threads that compute; handoff/expert_server.h has the one other thread.
//
// A Job is run by all workers at once, each with its own number; the job splits its work by that number and meets the
// other workers in its Team. Jobs run in the order of submission; a worker that is done with one starts the next, so
// two jobs in flight leave no gap. Workers spin for 50 us for the next job (a layer's hand-over takes less), then
// sleep: other code gets the cores.
#pragma once
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/gate.h"
#include "cpu/pool_layout.h"

namespace k2 {

// Thrown inside a job to leave it early; never reaches the submitter by itself.
struct Cancelled {};

// What the workers of one job share.
class Team {
 public:
  Team(Gate& gate, const std::atomic<bool>& stopping, std::chrono::nanoseconds spin, const WorkerMap& map)
      : gate_(gate), stopping_(stopping), spin_(spin), map_(map) {}

  int workers() const { return map_.workers(); }

  // A job that keeps memory per NUMA node: the nodes, a worker's node, its number there, and how many it is one of.
  int nodes() const { return map_.nodes(); }
  int node(int worker) const { return map_.node(worker); }
  int rank(int worker) const { return worker - map_.first(node(worker)); }
  int node_workers(int node) const { return map_.workers(node); }

  // Waits until all workers have called `sync` for the `round`th time (1, 2, ...). Throws Cancelled.
  void sync(int round) { sync(arrived_, workers(), round); }

  // The same among the `workers` workers that share `arrived`, which begins at 0: those of one node, for example.
  void sync(std::atomic<int>& arrived, int workers, int round) {
    if (arrived.fetch_add(1) + 1 == round * workers) notify();
    wait([&] { return arrived.load() >= round * workers; });
  }

  // Waits for a condition on atomics whose changers call `notify`. Throws Cancelled.
  template <class Ready>
  void wait(Ready ready) {
    gate_.wait([&] { return ready() || cancelled(); }, spin_);
    check_cancelled();
  }

  void notify() { gate_.notify(); }

  // Throws Cancelled if the job was cancelled, another worker failed, or the pool stops.
  void check_cancelled() const {
    if (cancelled()) throw Cancelled{};
  }

 private:
  friend class Job;

  bool cancelled() const { return cancelled_.load() || stopping_.load(); }

  void cancel() {
    cancelled_.store(true);
    gate_.notify();
  }

  Gate& gate_;
  const std::atomic<bool>& stopping_;
  const std::chrono::nanoseconds spin_;
  const WorkerMap& map_;
  std::atomic<int> arrived_{0};
  std::atomic<bool> cancelled_{false};
};

class ThreadPool;

// Work for all workers. Submitted at most once; must outlive its completion.
class Job {
 public:
  explicit Job(ThreadPool& pool);
  virtual ~Job() = default;
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // Asks the workers to leave; they do at the next check. The job still has to be waited for.
  void cancel() { team_.cancel(); }

  bool done() const { return done_.load(); }

  // Throws what the first failing worker threw; EngineError if the job was cancelled. Only after completion.
  void rethrow() const;

 protected:
  // Runs on worker 0..workers-1.
  virtual void run(Team& team, int worker) = 0;

 private:
  friend class ThreadPool;
  void run_guarded(int worker) noexcept;

  Team team_;
  std::mutex error_mutex_;
  std::exception_ptr error_;
  bool left_early_ = false;
  std::atomic<bool> done_{false};
};

class ThreadPool {
 public:
  // Workers on one node, wherever the process may run.
  explicit ThreadPool(int workers) : ThreadPool(PoolLayout{NodeWorkers{workers, kAnyNode, {}}}) {}
  // ArgumentError as WorkerMap; EngineError if the threads cannot be started.
  explicit ThreadPool(const PoolLayout& layout);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int workers() const { return map().workers(); }
  const WorkerMap& map() const;
  // Workers that the system keeps to the CPUs they were given.
  int pinned() const;

  // Starts the job; returns at once unless 64 jobs are in flight. EngineError after `stop`, and after a fork in the
  // child.
  void submit(Job& job);

  // Waits for the job; false if the deadline passes first. Does not throw what the job threw.
  bool wait(const Job& job, Deadline deadline = std::nullopt);

  // Waits for the job before it is destroyed; returns at once in a forked child, where nobody runs it.
  void finish(const Job& job) noexcept;

  // Cancels what is in flight and joins the workers. Waiters return; may be called again and from several threads, but
  // not from a worker.
  void stop();

  // In a child process after `fork`: the workers do not exist here.
  bool forked() const;
  // EngineError there.
  void check_process() const;

 private:
  friend class Job;
  struct State;

  // Leaked in a child process after `fork`: its threads do not exist there and its locks may be held.
  State* state_;
};

}  // namespace k2
