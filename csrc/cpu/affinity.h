// Which CPUs this process may use.
#pragma once

namespace k2 {

// CPUs in the affinity mask of the calling thread, at least 1.
int allowed_cpus();

}  // namespace k2
