// How many CPUs this process may use.
#pragma once

namespace shm {

// The smaller of its affinity mask and its cgroup's quota; at least 1.
int usable_cpus();

}  // namespace shm
