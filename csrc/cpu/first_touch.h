// Memory of NUMA nodes where the system refuses to bind it.
#pragma once
#include <vector>

#include "core/huge_buffer.h"
#include "cpu/thread_pool.h"

namespace k2 {

// `buffers`: one for each of the pool's nodes. Of those that are not bound, the workers of the node write to every page,
// so that the system takes it from where they run, as it does for a page that is new. The others stay as they are.
void first_touch(ThreadPool& pool, const std::vector<const HugeBuffer*>& buffers);

}  // namespace k2
