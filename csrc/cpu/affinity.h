// Which CPUs this process may use, and keeping a thread to some of them.
#pragma once
#include <thread>
#include <vector>

namespace k2 {

// CPUs in the affinity mask of the calling thread, at least 1.
int allowed_cpus();

// Keeps the thread to these CPUs. False if the system refuses: none of them exists or may be used by this process.
bool restrict_to(std::thread& thread, const std::vector<int>& cpus);

}  // namespace k2
