// The thread pool under every kind of use and misuse; also run with the thread sanitizer.
#include "cpu/thread_pool.h"

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
  idle_workers_sleep();
  if (argc == 1) fork_is_refused_in_the_child();  // any argument leaves it out: the sanitizer cannot fork with threads
  std::puts("ok");
}
