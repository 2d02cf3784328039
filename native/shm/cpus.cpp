#include "shm/cpus.h"

#include <sched.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <thread>

namespace shm {
namespace {

constexpr double kNoQuota = 1e9;

// cgroup v2, as mounted in a container: "<quota> <period>" or "max <period>", in microseconds.
void read_quota(Cpus* cpus) {
  cpus->quota = kNoQuota;
  struct stat where{};
  if (::stat("/sys/fs/cgroup", &where) == 0) {
    cpus->cgroup = where.st_ino ^ static_cast<uint64_t>(where.st_dev) << 40;
  }
  std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re");
  if (file == nullptr) return;
  double quota = 0, period = 0;
  if (std::fscanf(file, "%lf %lf", &quota, &period) == 2 && quota > 0 && period > 0) {
    cpus->quota = quota / period;
  }
  std::fclose(file);
}

// Gives `rank` a CPU, moving ranks that have one already to others of theirs (augmenting path).
bool place(const std::vector<const Cpus*>& ranks, int rank, std::vector<int>* owner,
           std::vector<bool>* tried) {
  for (size_t cpu = 0; cpu < kMaxCpus; ++cpu) {
    if (!ranks[rank]->has(cpu) || (*tried)[cpu]) continue;
    (*tried)[cpu] = true;
    if ((*owner)[cpu] < 0 || place(ranks, (*owner)[cpu], owner, tried)) {
      (*owner)[cpu] = rank;
      return true;
    }
  }
  return false;
}

}  // namespace

void read_affinity(CpuMask& mask) {
  // The system call itself: glibc's takes a set of 1024 CPUs.
  if (::syscall(SYS_sched_getaffinity, 0, sizeof mask, mask) > 0) return;
  const size_t count = std::clamp<size_t>(std::thread::hardware_concurrency(), 1, kMaxCpus);
  for (size_t cpu = 0; cpu < count; ++cpu) mask[cpu / 64] |= uint64_t{1} << (cpu % 64);
}

Cpus my_cpus(int threads) {
  Cpus cpus{};
  cpus.threads = threads;
  read_quota(&cpus);
  read_affinity(cpus.mask);
  return cpus;
}

Plan plan_cpus(const std::vector<const Cpus*>& ranks) {
  std::vector<int> owner(kMaxCpus, -1);
  std::vector<int> users(kMaxCpus, 0);
  bool core_each = true;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    std::vector<bool> tried(kMaxCpus, false);
    core_each = core_each && place(ranks, static_cast<int>(rank), &owner, &tried);
    for (size_t cpu = 0; cpu < kMaxCpus; ++cpu) users[cpu] += ranks[rank]->has(cpu);
  }
  int threads = 1 << 16;
  for (const Cpus* mine : ranks) {
    double share = 0;  // a CPU that n ranks may use is an n-th of one for each
    for (size_t cpu = 0; cpu < kMaxCpus; ++cpu) {
      if (mine->has(cpu)) share += 1.0 / users[cpu];
    }
    const auto together = std::count_if(ranks.begin(), ranks.end(), [&](const Cpus* theirs) {
      return theirs->cgroup == mine->cgroup;
    });
    const double quota = mine->quota / static_cast<double>(together);
    core_each = core_each && quota >= 1;
    // A little more than nothing: eight thirds of a CPU that do not quite add up to eight thirds.
    share = std::min(share, quota) + 1e-6;
    threads = std::min({threads, mine->threads, static_cast<int>(share)});
  }
  return {core_each, std::max(threads, 1)};
}

}  // namespace shm
