#include "shm/cpus.h"

#include <sched.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <thread>

namespace shm {
namespace {

int from_affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::thread::hardware_concurrency());  // more CPUs than a cpu_set_t holds
}

// cgroup v2, as mounted in a container: "<quota> <period>" or "max <period>", in microseconds.
int from_quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 1 << 20;
  return static_cast<int>(std::stod(quota) / period);
}

}  // namespace

int usable_cpus() { return std::max(1, std::min(from_affinity(), from_quota())); }

}  // namespace shm
