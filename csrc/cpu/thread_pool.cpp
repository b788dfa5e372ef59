#include "cpu/thread_pool.h"

#include <pthread.h>

#include <cfenv>
#include <string>

#include "core/error.h"
#include "cpu/affinity.h"
#include "cpu/blocked_signals.h"

namespace k2 {
namespace {

constexpr std::chrono::microseconds kSpin{50};
constexpr int kMaxWorkers = 4096;
constexpr uint64_t kRing = 64;  // jobs in flight; a decode step has two

// Counts the forks between the first process and this one.
std::atomic<uint64_t> fork_generation{0};

void register_fork_handler() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fork_generation.fetch_add(1); });
  if (registered != 0) throw EngineError("expert threads: the fork handler cannot be registered");
}

}  // namespace

WorkerMap::WorkerMap(const PoolLayout& layout) : first_{0} {
  check_argument(!layout.empty(), "nodes", "at least one", "none");
  for (const NodeWorkers& node : layout) {
    const int workers = node.workers;
    check_argument(workers >= 1 && workers <= kMaxWorkers - first_.back(), "threads", text("1..", kMaxWorkers), workers);
    const bool fits = node.cpus.empty() || node.cpus.size() == size_t(workers);
    check_argument(fits, "cpus", text("none or a list for each of ", workers, " threads"), node.cpus.size());
    node_.insert(node_.end(), size_t(workers), int(first_.size()) - 1);
    first_.push_back(first_.back() + workers);
  }
}

struct ThreadPool::State {
  explicit State(const PoolLayout& layout) : map(layout) {}

  struct Entry {
    Job* job = nullptr;
    std::atomic<int> remaining{0};  // workers that have not finished it
  };

  const WorkerMap map;
  int pinned = 0;
  std::chrono::nanoseconds worker_spin{0};
  std::chrono::nanoseconds caller_spin{0};
  uint64_t generation = 0;

  Gate work_gate;  // workers: the next job, and each other inside a job
  Gate done_gate;  // callers: completion
  std::array<Entry, kRing> ring;
  std::mutex submit_mutex;
  std::atomic<uint64_t> published{0};  // jobs submitted so far
  std::atomic<bool> leave{false};  // jobs end early
  std::atomic<bool> stop{false};   // no job comes any more
  std::mutex join_mutex;
  std::vector<std::thread> threads;

  void work(int worker);
  void start(const PoolLayout& layout);
  void join();
};

void ThreadPool::State::work(int worker) {
  // The environment is inherited from the creating thread; kernels rely on rounding to nearest and on denormals.
  std::fesetenv(FE_DFL_ENV);
  for (uint64_t ticket = 0;; ++ticket) {
    work_gate.wait([&] { return published.load() > ticket || stop.load(); }, worker_spin);
    if (published.load() <= ticket) return;
    Entry& entry = ring[ticket % kRing];
    Job& job = *entry.job;
    job.run_guarded(worker);
    if (entry.remaining.fetch_sub(1) == 1) {
      job.done_.store(true);  // the last touch of the job: its owner may destroy it now
      done_gate.notify();
    }
  }
}

void ThreadPool::State::start(const PoolLayout& layout) {
  const int count = map.workers();
  // With more threads than CPUs, a spinning thread would keep the one it waits for from running.
  const int cpus = allowed_cpus();
  worker_spin = count <= cpus ? kSpin : std::chrono::microseconds{0};
  caller_spin = count < cpus ? kSpin : std::chrono::microseconds{0};
  generation = fork_generation.load();
  const BlockedSignals blocked;
  for (int worker = 0; worker < count; ++worker) {
    threads.emplace_back([this, worker] { work(worker); });
    const std::string name = text("k2-expert-", worker);  // at most 15 characters: workers are 0..4095
    pthread_setname_np(threads.back().native_handle(), name.c_str());
    const NodeWorkers& node = layout[map.node(worker)];
    if (node.cpus.empty()) continue;
    pinned += restrict_to(threads.back(), node.cpus[worker - map.first(map.node(worker))]);
  }
}

void ThreadPool::State::join() {
  std::lock_guard one_at_a_time(join_mutex);
  leave.store(true);
  work_gate.notify();
  {  // a `submit` that waits for room gets it first: the jobs before it leave
    std::lock_guard lock(submit_mutex);
    stop.store(true);
  }
  work_gate.notify();
  for (std::thread& thread : threads) thread.join();
  threads.clear();
}

ThreadPool::ThreadPool(const PoolLayout& layout) : state_(new State(layout)) {
  try {
    register_fork_handler();
    state_->start(layout);
  } catch (const std::system_error& error) {
    const std::string message =
        text("expert threads: expected to start ", state_->map.workers(), ", got ", error.what());
    state_->join();
    delete state_;
    throw EngineError(message);
  } catch (...) {
    state_->join();
    delete state_;
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (forked()) return;
  state_->join();
  delete state_;
}

const WorkerMap& ThreadPool::map() const { return state_->map; }

int ThreadPool::pinned() const { return state_->pinned; }

bool ThreadPool::forked() const { return state_->generation != fork_generation.load(); }

void ThreadPool::check_process() const {
  if (forked()) throw EngineError("expert threads: expected the process that started them, got a fork of it");
}

void ThreadPool::stop() {
  if (!forked()) state_->join();
}

void ThreadPool::submit(Job& job) {
  check_process();
  std::lock_guard lock(state_->submit_mutex);
  if (state_->stop.load()) throw EngineError("expert threads: expected them running, got stopped ones");
  const uint64_t ticket = state_->published.load();
  State::Entry& entry = state_->ring[ticket % kRing];
  state_->done_gate.wait([&] { return entry.remaining.load() == 0; }, state_->caller_spin);
  entry.job = &job;
  entry.remaining.store(state_->map.workers());
  state_->published.store(ticket + 1);
  state_->work_gate.notify();
}

bool ThreadPool::wait(const Job& job, Deadline deadline) {
  check_process();
  return state_->done_gate.wait([&] { return job.done(); }, state_->caller_spin, deadline);
}

void ThreadPool::finish(const Job& job) noexcept {
  if (!forked()) state_->done_gate.wait([&] { return job.done(); }, state_->caller_spin);
}

Job::Job(ThreadPool& pool)
    : team_(pool.state_->work_gate, pool.state_->leave, pool.state_->worker_spin, pool.state_->map) {}

void Job::run_guarded(int worker) noexcept {
  try {
    run(team_, worker);
    return;
  } catch (const Cancelled&) {
    std::lock_guard lock(error_mutex_);
    left_early_ = true;
  } catch (...) {
    std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
  team_.cancel();
}

void Job::rethrow() const {
  if (error_) std::rethrow_exception(error_);
  if (left_early_) throw EngineError("expert job: expected it to finish, got cancelled");
}

}  // namespace k2
