// What arrangement of work is fastest on this machine, by trying.
#pragma once
#include <cstddef>

#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"

namespace k2 {

// Times the table's kernels on cold memory, on all workers, with one token and with several, and returns the table's
// tuning with what was clearly faster, and the cost of a token as measured. Takes about `seconds` beyond the first touch
// of a buffer of `bytes`, which should be far larger than the caches. It may differ from run to run where policies are
// equally fast. ArgumentError if the buffer is less than four pairs of row blocks per worker; MemoryError.
Tuning measure_tuning(ThreadPool& pool, const KernelTable& table, double seconds, size_t bytes);

}  // namespace k2
