// How fast the workers can multiply and add: the limit that a large batch is measured against.
#pragma once
#include <cstdint>

#include "cpu/thread_pool.h"

namespace k2 {

// A table's instructions with nothing else around them.
struct Peak {
  uint64_t (*run)(int64_t rounds);
  int64_t operations;  // multiplications and additions of a round
};

// Best pass of all workers, in 10^9 operations per second. Takes about `seconds`.
double measure_peak_gops(ThreadPool& pool, const Peak& peak, double seconds);

}  // namespace k2
