// The operators that open and close groups over CPU shared memory, and what the end of the process
// means to them. The collectives are in shm_collectives_cpu.cpp; what they do is in native/shm.
#include <pthread.h>
#include <time.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <vector>

#include "shm/collectives.h"
#include "shm/process.h"
#include "torch/errors.h"
#include "torch/shm_teams.h"

namespace torch_glue {
namespace {

[[noreturn]] void not_open(int64_t handle) {
  prim::fail(prim::kInvalid, "CPU shared memory: ", handle, " is not the handle of an open group");
}

}  // namespace

// Never destroyed: a thread may be in a call while the process ends.
prim::Handles<shm::Team>& teams() {
  static auto& all = *new prim::Handles<shm::Team>;
  return all;
}

TeamPtr team_of(int64_t handle) {
  TeamPtr team = teams().get(handle);
  if (!team) not_open(handle);
  if (!team->is_mine()) throw shm::Error(team->refusal_after_fork());
  return team;
}

}  // namespace torch_glue

namespace {

using torch_glue::team_of;
using torch_glue::TeamPtr;
using torch_glue::teams;

[[maybe_unused]] const int at_fork = ::pthread_atfork(
    [] { teams().before_fork(); }, [] { teams().after_fork(); }, [] { teams().after_fork(); });

// Those of this process.
std::vector<TeamPtr> own_teams() {
  std::vector<TeamPtr> all = teams().all();
  std::erase_if(all, [](const TeamPtr& team) { return !team->is_mine(); });
  return all;
}

// At the end of the process the peers are told that this rank makes no more calls.
struct AtEnd {
  ~AtEnd() {
    for (const TeamPtr& team : own_teams()) {
      if (team->use(::pthread_self()) != shm::Team::Use::kInCall) team->announce_close();
    }
  }
} at_end;

// A thread that came out of a call needs so long, at most, to have the interpreter's lock. One that
// was told of the exit says when it has it, unless a compiled graph made the call.
constexpr int64_t kReturnNs = 50'000'000;
constexpr int64_t kToldNs = 100'000'000;

// Whether no thread but this one is in a call or on its way out of one.
bool all_are_back(const prim::Deadline& returned, const prim::Deadline& told) {
  if (shm::threads_on_their_way() != 0 && !told.passed()) return false;
  for (const TeamPtr& team : own_teams()) {
    const auto use = team->use(::pthread_self());
    if (use == shm::Team::Use::kInCall) return false;
    if (use == shm::Team::Use::kMayBeReturning && !returned.passed()) return false;
  }
  return true;
}

void run_parallel(size_t count, void (*task)(void*, size_t), void* context) {
  torch::stable::parallel_for(0, static_cast<int64_t>(count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, static_cast<size_t>(i));
  });
}

// `threads_limit`: at most so many work on this rank's share; 0: as many as there are cores for it.
int64_t shm_open(std::string dir, int64_t rank, int64_t world_size, int64_t shm_bytes,
                 double timeout_s, int64_t spin_us, int64_t threads_limit) {
  auto threads = static_cast<int>(torch::stable::get_num_threads());
  if (threads_limit > 0) threads = static_cast<int>(std::min<int64_t>(threads, threads_limit));
  const shm::Options options{std::move(dir), static_cast<size_t>(std::max<int64_t>(shm_bytes, 0)),
                             timeout_s, spin_us * 1000, threads};
  auto team =
      std::make_shared<shm::Team>(static_cast<int>(rank), static_cast<int>(world_size), options);
  team->set_pool(run_parallel);
  return teams().add(std::move(team));
}

// Where the peers find this rank, for a join with addresses.
std::string shm_address(int64_t handle) { return team_of(handle)->address(); }

// `addresses`: of all ranks, with spaces between; none: they follow from the name.
void shm_join(int64_t handle, std::string name, std::string addresses) {
  std::vector<std::string> found;
  for (size_t begin = 0; begin < addresses.size();) {
    const size_t end = std::min(addresses.find(' ', begin), addresses.size());
    found.push_back(addresses.substr(begin, end - begin));
    begin = end + 1;
  }
  team_of(handle)->join(name, std::move(found));
}

void shm_close(int64_t handle) {
  // A forked child has nothing to give back, and keeps what it does not use.
  if (const TeamPtr team = teams().get(handle); team && !team->is_mine()) return;
  if (!teams().remove(handle)) torch_glue::not_open(handle);
}

// For measurements and tests. Collective, with the same values on all ranks.
void shm_set_tuning(int64_t handle, int64_t one_shot_bytes, int64_t chunk_bytes, int64_t threads) {
  if (one_shot_bytes < 0 || chunk_bytes < 16384) {
    prim::fail(prim::kInvalid,
               "shm_set_tuning: one_shot_bytes >= 0 and chunk_bytes >= 16384 are expected");
  }
  const TeamPtr team = team_of(handle);
  team->set_tuning({static_cast<size_t>(one_shot_bytes), static_cast<size_t>(chunk_bytes)});
  barrier(*team);
  team->set_lanes(static_cast<int>(threads));
}

// [whether each rank has a core to itself, threads that a rank works with].
std::vector<int64_t> shm_plan(int64_t handle) {
  const TeamPtr team = team_of(handle);
  return {team->core_each(), team->lanes()};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(communicators, m) {
  m.def(
      "shm_open(str dir, int rank, int world_size, int shm_bytes, float timeout_s, int spin_us, "
      "int threads=0) -> int");
  m.def("shm_address(int handle) -> str");
  m.def("shm_join(int handle, str name, str addresses=\"\") -> ()");
  m.def("shm_close(int handle) -> ()");
  m.def("shm_set_tuning(int handle, int one_shot_bytes, int chunk_bytes, int threads) -> ()");
  m.def("shm_plan(int handle) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(communicators, CompositeExplicitAutograd, m) {
  m.impl("shm_open", torch_glue::boxed<&shm_open>);
  m.impl("shm_address", torch_glue::boxed<&shm_address>);
  m.impl("shm_join", torch_glue::boxed<&shm_join>);
  m.impl("shm_close", torch_glue::boxed<&shm_close>);
  m.impl("shm_set_tuning", torch_glue::boxed<&shm_set_tuning>);
  m.impl("shm_plan", torch_glue::boxed<&shm_plan>);
}

// Called once, with the interpreter's lock released, when the process begins to exit: ends the
// calls of other threads and waits until they are back in Python, at most `timeout_ns`.
extern "C" __attribute__((visibility("default"))) void communicators_end_calls(int64_t timeout_ns) {
  shm::begin_exit();
  const auto deadline = prim::Deadline::after_ns(timeout_ns);
  const auto returned = prim::Deadline::after_ns(kReturnNs);
  const auto told = prim::Deadline::after_ns(kToldNs);
  while (!all_are_back(returned, told) && !deadline.passed()) {
    const timespec pause{0, 500'000};
    ::nanosleep(&pause, nullptr);
  }
}
