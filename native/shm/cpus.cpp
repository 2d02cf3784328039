#include "shm/cpus.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
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
  constexpr int kNone = 1 << 20;
  std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re");
  if (file == nullptr) return kNone;
  double quota = 0, period = 0;
  const bool limited = std::fscanf(file, "%lf %lf", &quota, &period) == 2 && period > 0;
  std::fclose(file);
  return limited ? static_cast<int>(quota / period) : kNone;
}

}  // namespace

int usable_cpus() { return std::max(1, std::min(from_affinity(), from_quota())); }

}  // namespace shm
