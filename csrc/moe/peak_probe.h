// How fast the workers can multiply and add: the limit that a large batch is measured against.
#pragma once
#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"

namespace k2 {

// Best pass of all workers over the table's instructions, in 10^9 operations per second. Takes about `seconds`.
double measure_peak_gops(ThreadPool& pool, const KernelTable& table, double seconds);

}  // namespace k2
