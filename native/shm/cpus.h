// The CPUs that the ranks of a group may run on, and what follows for all of them together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace shm {

inline constexpr size_t kMaxCpus = 4096;

// Bit by bit, the CPUs that this process may run on.
using CpuMask = uint64_t[kMaxCpus / 64];
void read_affinity(CpuMask& mask);

// What one rank may use, as it tells the others when they meet: a rank that is pinned to one core
// sees one, and whether the ranks have a core each is known to all of them together alone.
struct Cpus {
  CpuMask mask;     // affinity
  double quota;     // of the cgroup, in CPUs; huge where there is none
  uint64_t cgroup;  // which cgroup that is
  int32_t threads;  // that it would work with if it were alone
  bool has(size_t cpu) const { return mask[cpu / 64] >> (cpu % 64) & 1; }
};

// This process's own.
Cpus my_cpus(int threads);

// What all ranks decide alike from all their Cpus.
struct Plan {
  bool core_each;  // every rank can run on a core that no other one needs
  int threads;     // that each rank may work with at once; at least 1, the same on all
};
Plan plan_cpus(const std::vector<const Cpus*>& ranks);

}  // namespace shm
