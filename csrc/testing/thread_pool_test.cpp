// The thread pool under every kind of use and misuse; also run with the thread sanitizer.
#include "cpu/thread_pool.h"

#include <sched.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "core/error.h"
#include "testing/check.h"

namespace k2 {
namespace {

class Task final : public Job {
 public:
  Task(ThreadPool& pool, std::function<void(Team&, int)> body) : Job(pool), body_(std::move(body)) {}

 private:
  void run(Team& team, int worker) override { body_(team, worker); }
  std::function<void(Team&, int)> body_;
};

void run(ThreadPool& pool, std::function<void(Team&, int)> body) {
  Task task(pool, std::move(body));
  pool.submit(task);
  K2_EXPECT(pool.wait(task));
  task.rethrow();
}

Deadline in_ms(int ms) { return Clock::now() + std::chrono::milliseconds(ms); }

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return double(t.tv_sec) + double(t.tv_nsec) * 1e-9;
}

void every_worker_runs_once(int workers) {
  ThreadPool pool(workers);
  for (int job = 0; job < 200; ++job) {
    std::vector<int> calls(workers, 0);  // plain memory: the sanitizer sees whether completion orders it
    run(pool, [&](Team& team, int worker) {
      K2_EXPECT(team.workers() == workers);
      ++calls[worker];
    });
    for (const int count : calls) K2_EXPECT(count == 1);
  }
}

void sync_orders_rounds(int workers) {
  ThreadPool pool(workers);
  for (int job = 0; job < 20; ++job) {
    std::vector<int> values(workers, 0);
    run(pool, [&](Team& team, int worker) {
      for (int round = 1; round <= 10; ++round) {
        values[worker] = round;
        team.sync(2 * round - 1);
        for (const int value : values) K2_EXPECT(value == round);
        team.sync(2 * round);
      }
    });
  }
}

void jobs_run_in_order() {
  ThreadPool pool(3);
  std::vector<int> order;  // written by worker 0 alone
  std::vector<std::unique_ptr<Task>> tasks;
  for (int i = 0; i < 200; ++i) {  // more than fit in flight: submit waits for room
    tasks.push_back(std::make_unique<Task>(pool, [&order, i](Team&, int worker) {
      if (worker == 0) order.push_back(i);
    }));
    pool.submit(*tasks.back());
  }
  for (auto& task : tasks) K2_EXPECT(pool.wait(*task));
  for (int i = 0; i < 200; ++i) K2_EXPECT(order[i] == i);
}

void first_exception_is_rethrown() {
  ThreadPool pool(4);
  for (int job = 0; job < 50; ++job) {
    std::string message;
    try {
      run(pool, [](Team& team, int worker) {
        if (worker == 2) throw std::out_of_range("worker 2 failed");
        team.sync(1);  // would wait for worker 2 for ever
      });
    } catch (const std::out_of_range& error) {
      message = error.what();
    }
    K2_EXPECT(message == "worker 2 failed");
  }
  run(pool, [](Team& team, int) { team.sync(1); });  // the pool goes on
}

void wait_has_a_deadline_and_cancel_ends_a_job() {
  ThreadPool pool(2);
  std::atomic<bool> never{false};
  Task task(pool, [&](Team& team, int) { team.wait([&] { return never.load(); }); });
  pool.submit(task);
  K2_EXPECT(!pool.wait(task, in_ms(5)));
  task.cancel();
  K2_EXPECT(pool.wait(task, in_ms(10000)));
  bool cancelled = false;
  try {
    task.rethrow();
  } catch (const EngineError&) {
    cancelled = true;
  }
  K2_EXPECT(cancelled);
}

void stop_ends_what_is_in_flight() {
  ThreadPool pool(3);
  std::atomic<bool> never{false};
  Task first(pool, [&](Team& team, int) { team.wait([&] { return never.load(); }); });
  Task second(pool, [&](Team& team, int) { team.sync(1); });
  pool.submit(first);
  pool.submit(second);
  pool.stop();
  K2_EXPECT(first.done() && second.done());
  bool refused = false;
  try {
    pool.submit(second);
  } catch (const EngineError&) {
    refused = true;
  }
  K2_EXPECT(refused);
  pool.stop();
}

void stop_ends_a_full_pool() {
  ThreadPool pool(2);
  std::atomic<bool> never{false};
  std::vector<std::unique_ptr<Task>> tasks;
  for (int i = 0; i < 70; ++i) {
    tasks.push_back(std::make_unique<Task>(pool, [&](Team& team, int) { team.wait([&] { return never.load(); }); }));
  }
  std::atomic<int> accepted{0};
  std::thread submitter([&] {  // blocks on the 65th
    try {
      for (auto& task : tasks) {
        pool.submit(*task);
        accepted.fetch_add(1);
      }
    } catch (const EngineError&) {
    }
  });
  while (accepted.load() < 64) std::this_thread::yield();
  std::thread other([&] { pool.stop(); });
  pool.stop();
  other.join();
  submitter.join();
  for (int i = 0; i < accepted.load(); ++i) K2_EXPECT(tasks[i]->done());
}

void two_threads_submit() {
  ThreadPool pool(2);
  std::atomic<int> sum{0};
  auto submit_many = [&] {
    for (int i = 0; i < 100; ++i) run(pool, [&](Team&, int) { sum.fetch_add(1); });
  };
  std::thread other(submit_many);
  submit_many();
  other.join();
  K2_EXPECT(sum.load() == 400);
}

std::vector<int> current_cpus() {
  cpu_set_t set;
  K2_EXPECT(sched_getaffinity(0, sizeof(set), &set) == 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

void workers_know_their_node() {
  ThreadPool pool(PoolLayout{{2, kAnyNode, {}}, {1, kAnyNode, {}}, {3, kAnyNode, {}}});
  K2_EXPECT(pool.workers() == 6 && pool.map().nodes() == 3 && pool.pinned() == 0);
  std::vector<int> nodes(6), ranks(6), sizes(6);
  std::atomic<int> arrived[3]{};
  std::vector<int> values(6, 0);
  run(pool, [&](Team& team, int worker) {
    const int node = team.node(worker);
    nodes[worker] = node;
    ranks[worker] = team.rank(worker);
    sizes[worker] = team.node_workers(node);
    K2_EXPECT(team.workers() == 6 && team.nodes() == 3);
    for (int round = 1; round <= 5; ++round) {  // the nodes meet apart from each other
      values[worker] = round;
      team.sync(arrived[node], sizes[worker], 2 * round - 1);
      for (int other = worker - ranks[worker], i = 0; i < sizes[worker]; ++i) K2_EXPECT(values[other + i] == round);
      team.sync(arrived[node], sizes[worker], 2 * round);
    }
  });
  K2_EXPECT((nodes == std::vector<int>{0, 0, 1, 2, 2, 2}));
  K2_EXPECT((ranks == std::vector<int>{0, 1, 0, 0, 1, 2}));
  K2_EXPECT((sizes == std::vector<int>{2, 2, 1, 3, 3, 3}));
}

void workers_stay_where_they_are_put() {
  const std::vector<int> allowed = current_cpus();
  const std::vector<int> first{allowed.front()}, last{allowed.back()};
  ThreadPool pool(PoolLayout{{1, kAnyNode, {first}}, {2, kAnyNode, {last, allowed}}});
  K2_EXPECT(pool.pinned() == 3);
  std::vector<std::vector<int>> seen(3);
  run(pool, [&](Team&, int worker) { seen[worker] = current_cpus(); });
  K2_EXPECT(seen[0] == first && seen[1] == last && seen[2] == allowed);
  K2_EXPECT(current_cpus() == allowed);  // the program's own threads go where they like
}

// A CPU that is not there, or not allowed: the worker runs where the process may.
void a_refused_cpu_leaves_the_worker_free() {
  const std::vector<int> allowed = current_cpus();
  ThreadPool pool(PoolLayout{{3, kAnyNode, {{100000}, {-1}, {}}}});
  K2_EXPECT(pool.pinned() == 0);
  std::vector<std::vector<int>> seen(3);
  run(pool, [&](Team&, int worker) { seen[worker] = current_cpus(); });
  for (const std::vector<int>& cpus : seen) K2_EXPECT(cpus == allowed);
}

void a_wrong_layout_is_refused() {
  const PoolLayout wrong[] = {{},
                              {{0, kAnyNode, {}}},
                              {{2, kAnyNode, {}}, {-1, kAnyNode, {}}},
                              {{4000, kAnyNode, {}}, {97, kAnyNode, {}}},
                              {{2, kAnyNode, {{0}}}}};
  for (const PoolLayout& layout : wrong) {
    bool refused = false;
    try {
      ThreadPool pool(layout);
    } catch (const ArgumentError&) {
      refused = true;
    }
    K2_EXPECT(refused);
  }
}

void idle_workers_sleep() {
  ThreadPool pool(2);
  run(pool, [](Team&, int) {});
  usleep(5000);  // far longer than the spin
  const double before = cpu_seconds();
  usleep(50000);
  K2_EXPECT(cpu_seconds() - before < 0.02);
}

// A forked child has no workers: it gets an error and can exit; the parent goes on.
void fork_is_refused_in_the_child() {
  ThreadPool pool(2);
  const pid_t child = fork();
  if (child == 0) {
    int code = 1;
    {
      ThreadPool* copy = &pool;
      try {
        Task task(*copy, [](Team&, int) {});
        copy->submit(task);
      } catch (const EngineError&) {
        code = 0;
      }
      copy->~ThreadPool();
    }
    _exit(code);
  }
  int status = 0;
  K2_EXPECT(waitpid(child, &status, 0) == child);
  K2_EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  run(pool, [](Team&, int) {});
}

}  // namespace
}  // namespace k2

int main(int argc, char**) {
  using namespace k2;
  for (const int workers : {1, 2, 3, 5}) {
    every_worker_runs_once(workers);
    sync_orders_rounds(workers);
  }
  jobs_run_in_order();
  first_exception_is_rethrown();
  wait_has_a_deadline_and_cancel_ends_a_job();
  stop_ends_what_is_in_flight();
  stop_ends_a_full_pool();
  two_threads_submit();
  workers_know_their_node();
  workers_stay_where_they_are_put();
  a_refused_cpu_leaves_the_worker_free();
  a_wrong_layout_is_refused();
  if (argc == 1) {  // any argument leaves these out: the tools cannot fork with threads, and take time themselves
    idle_workers_sleep();
    fork_is_refused_in_the_child();
  }
  std::puts("ok");
}
