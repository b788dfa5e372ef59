// Units of work for all workers: each takes its own first, so that it knows what comes next, then what others have left.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "cpu/share.h"

namespace k2 {

class UnitQueue {
 public:
  enum class Deal {
    kRuns,        // a worker's own units are neighbours
    kRoundRobin,  // they are `workers` apart: all workers begin with the first units
  };

  struct Unit {
    int64_t unit;  // -1: none is left
    int64_t next;  // what this worker most likely takes next; -1: unknown
  };

  UnitQueue(Deal deal, int64_t units, int workers)
      : deal_(deal), units_(units), workers_(workers), taken_(new std::atomic<int64_t>[workers]()) {}

  // A unit that nobody has taken yet.
  Unit take(int worker) {
    for (int i = 0; i < workers_; ++i) {
      const int owner = (worker + i) % workers_;
      const Unit found = take_from(owner);
      if (found.unit >= 0) return found;
    }
    return {-1, -1};
  }

 private:
  Unit take_from(int owner) {
    const Share share{owner, workers_};
    const int64_t first = deal_ == Deal::kRuns ? share.begin(units_) : owner;
    const int64_t last = deal_ == Deal::kRuns ? share.end(units_) : units_;
    const int64_t step = deal_ == Deal::kRuns ? 1 : workers_;
    if (first + taken_[owner].load() * step >= last) return {-1, -1};  // most looks at others find nothing
    const int64_t unit = first + taken_[owner].fetch_add(1) * step;
    if (unit >= last) return {-1, -1};
    return {unit, unit + step < last ? unit + step : -1};
  }

  const Deal deal_;
  const int64_t units_;
  const int workers_;
  std::unique_ptr<std::atomic<int64_t>[]> taken_;  // [workers] of each one's own units
};

}  // namespace k2
