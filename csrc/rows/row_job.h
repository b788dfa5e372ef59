// Rows that do not depend on each other, on all workers of the pool.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/share.h"
#include "cpu/thread_pool.h"

namespace k2 {

// Numbers from which on a second thread pays: it takes some microseconds to wake.
constexpr int64_t kManyNumbers = 1 << 17;

// Calls work(first, last) for parts of 0..rows-1.
template <class Work>
class RowJob final : public Job {
 public:
  RowJob(ThreadPool& pool, int64_t rows, const Work& work) : Job(pool), rows_(rows), work_(work) {}

 private:
  static constexpr int64_t kCheckRows = 64;  // between two looks at whether the job was cancelled

  void run(Team& team, int worker) override {
    const Share share{worker, team.workers()};
    const int64_t last = share.end(rows_);
    for (int64_t row = share.begin(rows_); row < last; row += kCheckRows) {
      team.check_cancelled();
      work_(row, std::min(last, row + kCheckRows));
    }
  }

  const int64_t rows_;
  const Work& work_;
};

}  // namespace k2
