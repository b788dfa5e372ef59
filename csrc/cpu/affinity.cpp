#include "cpu/affinity.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>

namespace k2 {

int allowed_cpus() {
  // The kernel refuses a mask that is smaller than its own number of CPUs, so grow until it fits.
  for (size_t cpus = 1024; cpus <= (1u << 20); cpus *= 4) {
    std::vector<unsigned char> mask(CPU_ALLOC_SIZE(cpus));
    cpu_set_t* set = reinterpret_cast<cpu_set_t*>(mask.data());
    if (sched_getaffinity(0, mask.size(), set) == 0) {
      const int count = CPU_COUNT_S(mask.size(), set);
      return count > 0 ? count : 1;
    }
  }
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? int(count) : 1;
}

bool restrict_to(std::thread& thread, const std::vector<int>& cpus) {
  if (cpus.empty() || *std::min_element(cpus.begin(), cpus.end()) < 0) return false;
  std::vector<unsigned char> mask(CPU_ALLOC_SIZE(size_t(*std::max_element(cpus.begin(), cpus.end())) + 1));
  cpu_set_t* set = reinterpret_cast<cpu_set_t*>(mask.data());
  for (const int cpu : cpus) CPU_SET_S(size_t(cpu), mask.size(), set);
  return pthread_setaffinity_np(thread.native_handle(), mask.size(), set) == 0;
}

}  // namespace k2
