// How long a job takes.
#pragma once
#include <chrono>

#include "cpu/thread_pool.h"

namespace k2 {

// Runs the job; in seconds. Throws what it threw.
inline double time_job(ThreadPool& pool, Job& job) {
  const Clock::time_point start = Clock::now();
  pool.submit(job);
  pool.wait(job);
  job.rethrow();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace k2
