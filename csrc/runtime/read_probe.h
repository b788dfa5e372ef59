// How fast the workers can read memory: the limit that a decode step is measured against.
#pragma once
#include <cstddef>

#include "cpu/thread_pool.h"
#include "kernels/kernel_table.h"

namespace k2 {

constexpr size_t kProbeUnit = size_t(2) << 20;  // each worker reads whole units of this

// Best pass over a buffer of `bytes`, which should be far larger than the caches, in 10^9 bytes per second. Takes
// `seconds` and at least one pass. ArgumentError if the buffer is less than one unit per worker; MemoryError.
double measure_read_gbps(ThreadPool& pool, const KernelTable& table, double seconds, size_t bytes);

}  // namespace k2
