// A job whose caller may leave early: what the job uses is not released before the job has ended.
#pragma once
#include <functional>
#include <utility>

#include "cpu/thread_pool.h"

namespace k2 {

// Returns when the job has ended; throws what it threw, or whatever makes the caller give up, after ending the job.
using Wait = std::function<void(Job&)>;

template <class AnyJob>
class InFlight {
 public:
  template <class... Arguments>
  explicit InFlight(ThreadPool& pool, Arguments&&... arguments)
      : pool_(pool), job_(pool, std::forward<Arguments>(arguments)...) {
    pool_.submit(job_);
  }
  ~InFlight() {
    if (!job_.done()) job_.cancel();
    pool_.finish(job_);
  }
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;

  Job& job() { return job_; }

 private:
  ThreadPool& pool_;
  AnyJob job_;
};

}  // namespace k2
