// How fast the workers can read memory: the limit that a decode step is measured against.
#pragma once
#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"

namespace k2 {

// Best pass over a buffer far larger than the caches, in 10^9 bytes per second. Takes `seconds` and at least one pass,
// and 512 MiB of memory meanwhile.
double measure_read_gbps(ThreadPool& pool, const KernelTable& table, double seconds);

}  // namespace k2
