// The operators of CPU shared memory: handles, argument checks, registration. What they do is in
// native/shm. A handle stands for one Team: this rank's part in one group.
#include <pthread.h>
#include <time.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "shm/channel.h"
#include "shm/collectives.h"
#include "shm/process.h"
#include "shm/reduce.h"
#include "torch/dtypes.h"

namespace {

using torch::stable::Tensor;
using TeamPtr = std::shared_ptr<shm::Team>;

// What every collective writes, to a compiler, and none reads or writes: it keeps their order
// (communicators/groups/traced.py).
using Order = std::optional<Tensor>;

// Handles are indices and are not used again, so a stale one is noticed.
class Teams {
 public:
  int64_t add(TeamPtr team) {
    const std::lock_guard lock(mutex_);
    teams_.push_back({team, team});
    return static_cast<int64_t>(teams_.size()) - 1;
  }
  // A call holds its Team, so that another thread's shm_close does not unmap it underneath.
  TeamPtr get(int64_t handle) {
    const std::lock_guard lock(mutex_);
    if (handle < 0 || handle >= static_cast<int64_t>(teams_.size()) || !teams_[handle].open) {
      throw shm::Error("InvalidArgumentError: CPU shared memory: " + std::to_string(handle) +
                       " is not the handle of an open group");
    }
    const TeamPtr& team = teams_[handle].open;
    if (!team->is_mine()) throw shm::Error(team->refusal_after_fork());
    return team;
  }
  void remove(int64_t handle) {
    TeamPtr last;
    const std::lock_guard lock(mutex_);
    if (handle >= 0 && handle < static_cast<int64_t>(teams_.size())) {
      // A forked child has nothing to give back, and keeps what it does not use.
      if (teams_[handle].open && !teams_[handle].open->is_mine()) return;
      last = std::move(teams_[handle].open);
    }
    if (last) return;
    throw shm::Error("InvalidArgumentError: CPU shared memory: " + std::to_string(handle) +
                     " is not the handle of an open group");
  }

  // The Teams that exist, also those that were closed while a thread was in a call.
  std::vector<TeamPtr> all() {
    const std::lock_guard lock(mutex_);
    std::vector<TeamPtr> found;
    for (const Entry& entry : teams_) {
      if (TeamPtr team = entry.team.lock(); team && team->is_mine()) {
        found.push_back(std::move(team));
      }
    }
    return found;
  }

  // fork() waits until no thread is in here: the child has no such thread that would leave.
  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

 private:
  struct Entry {
    TeamPtr open;
    std::weak_ptr<shm::Team> team;
  };
  std::mutex mutex_;
  std::vector<Entry> teams_;
};

// Never destroyed: a thread may be in a call while the process ends.
Teams& teams() {
  static Teams& all = *new Teams;
  return all;
}

[[maybe_unused]] const int at_fork = ::pthread_atfork(
    [] { teams().before_fork(); }, [] { teams().after_fork(); }, [] { teams().after_fork(); });

// At the end of the process the peers are told that this rank makes no more calls.
struct AtEnd {
  ~AtEnd() {
    for (const TeamPtr& team : teams().all()) {
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
  for (const TeamPtr& team : teams().all()) {
    const auto use = team->use(::pthread_self());
    if (use == shm::Team::Use::kInCall) return false;
    if (use == shm::Team::Use::kMayBeReturning && !returned.passed()) return false;
  }
  return true;
}

shm::DType dtype_of(const Tensor& x) { return static_cast<shm::DType>(torch_glue::dtype_of(x)); }

size_t bytes_of(const Tensor& x) { return static_cast<size_t>(x.numel()) * x.element_size(); }

[[noreturn]] void reject(const char* op, const std::string& what) {
  throw shm::Error("InvalidArgumentError: " + std::string(op) + ": " + what);
}

void check(const char* op, const char* argument, const Tensor& x) {
  if (!x.is_cpu()) reject(op, std::string(argument) + " is not on the CPU");
  if (!x.is_contiguous()) reject(op, std::string(argument) + " is not contiguous");
  if (torch_glue::dtype_of(x) == torch::headeronly::ScalarType::Undefined) {
    reject(op, std::string(argument) + " has a dtype that torch's stable interface does not name");
  }
}

void check_pair(const char* op, const Tensor& out, const Tensor& inp, int64_t out_factor,
                int64_t inp_factor) {
  check(op, "out", out);
  check(op, "inp", inp);
  if (dtype_of(out) != dtype_of(inp)) {
    reject(op, "out is " + name_of(dtype_of(out)) + " and inp is " + name_of(dtype_of(inp)) +
                   "; they must have one dtype");
  }
  if (out.numel() * out_factor != inp.numel() * inp_factor) {
    reject(op,
           "out has " + std::to_string(out.numel()) + " elements and inp has " +
               std::to_string(inp.numel()) + "; out must have " +
               (inp_factor == 1 && out_factor == 1
                    ? std::string("as many")
                    : std::to_string(inp_factor) + "/" + std::to_string(out_factor) + " of them"));
  }
}

void check_summed(const char* op, const Tensor& x) {
  if (shm::sum_element_size(dtype_of(x)) == 0) {
    reject(op, "dtype " + name_of(dtype_of(x)) +
                   " cannot be summed; float32, float16, bfloat16, float64, int8 to int64 and "
                   "uint8 can");
  }
}

void check_inner(const char* op, int64_t inner, int64_t elements) {
  if (inner < 0 || (inner == 0 ? elements != 0 : elements % inner != 0)) {
    reject(op, "rows of " + std::to_string(inner) + " elements do not divide " +
                   std::to_string(elements));
  }
}

int check_rank(const char* op, const char* argument, const shm::Team& team, int64_t rank,
               bool other = false) {
  if (rank < 0 || rank >= team.world_size() || (other && rank == team.rank())) {
    reject(op, std::string(argument) + "=" + std::to_string(rank) + " is not " +
                   (other ? "another rank" : "a rank") + " of the group of " +
                   std::to_string(team.world_size()) + "; this is rank " +
                   std::to_string(team.rank()));
  }
  return static_cast<int>(rank);
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
std::string shm_address(int64_t handle) { return teams().get(handle)->address(); }

// `addresses`: of all ranks, with spaces between; none: they follow from the name.
void shm_join(int64_t handle, std::string name, std::string addresses) {
  std::vector<std::string> found;
  for (size_t begin = 0; begin < addresses.size();) {
    const size_t end = std::min(addresses.find(' ', begin), addresses.size());
    found.push_back(addresses.substr(begin, end - begin));
    begin = end + 1;
  }
  teams().get(handle)->join(name, std::move(found));
}

void shm_close(int64_t handle) { teams().remove(handle); }

// For measurements and tests. Collective, with the same values on all ranks.
void shm_set_tuning(int64_t handle, int64_t one_shot_bytes, int64_t chunk_bytes, int64_t threads) {
  if (one_shot_bytes < 0 || chunk_bytes < 16384) {
    reject("shm_set_tuning", "one_shot_bytes >= 0 and chunk_bytes >= 16384 are expected");
  }
  const TeamPtr team = teams().get(handle);
  team->set_tuning({static_cast<size_t>(one_shot_bytes), static_cast<size_t>(chunk_bytes)});
  barrier(*team);
  team->set_lanes(static_cast<int>(threads));
}

// [whether each rank has a core to itself, threads that a rank works with].
std::vector<int64_t> shm_plan(int64_t handle) {
  const TeamPtr team = teams().get(handle);
  return {team->core_each(), team->lanes()};
}

void shm_barrier(int64_t handle, Order) { barrier(*teams().get(handle)); }

void shm_all_reduce_(Tensor x, int64_t handle, Order) {
  check("all_reduce_", "x", x);
  check_summed("all_reduce_", x);
  void* data = x.mutable_data_ptr();
  all_reduce(*teams().get(handle), dtype_of(x), data, data, static_cast<size_t>(x.numel()));
}

void shm_all_reduce_out(Tensor out, Tensor inp, int64_t handle, Order) {
  check_pair("all_reduce", out, inp, 1, 1);
  check_summed("all_reduce", inp);
  all_reduce(*teams().get(handle), dtype_of(inp), inp.const_data_ptr(), out.mutable_data_ptr(),
             static_cast<size_t>(inp.numel()));
}

Tensor shm_all_reduce(Tensor x, int64_t handle, Order) {
  check("all_reduce", "x", x);
  Tensor out = torch::stable::empty_like(x);
  shm_all_reduce_out(out, x, handle, std::nullopt);
  return out;
}

void shm_all_gather(Tensor out, Tensor inp, int64_t inner, int64_t handle, Order) {
  const TeamPtr team = teams().get(handle);
  check_pair("all_gather", out, inp, 1, team->world_size());
  check_inner("all_gather", inner, inp.numel());
  all_gather(*team, dtype_of(inp), inp.const_data_ptr(), out.mutable_data_ptr(), bytes_of(inp),
             static_cast<size_t>(inner) * inp.element_size());
}

void shm_gather(std::optional<Tensor> out, Tensor inp, int64_t inner, int64_t root, int64_t handle,
                Order) {
  const TeamPtr team = teams().get(handle);
  const int to = check_rank("gather", "root", *team, root);
  check("gather", "inp", inp);
  check_inner("gather", inner, inp.numel());
  void* data = nullptr;
  if (to == team->rank()) {
    if (!out) reject("gather", "rank " + std::to_string(to) + " is the root and has no out");
    check_pair("gather", *out, inp, 1, team->world_size());
    data = out->mutable_data_ptr();
  }
  gather(*team, dtype_of(inp), inp.const_data_ptr(), data, bytes_of(inp),
         static_cast<size_t>(inner) * inp.element_size(), to);
}

void shm_reduce_scatter(Tensor out, Tensor inp, int64_t inner, int64_t handle, Order) {
  const TeamPtr team = teams().get(handle);
  check_pair("reduce_scatter", out, inp, team->world_size(), 1);
  check_summed("reduce_scatter", inp);
  check_inner("reduce_scatter", inner, out.numel());
  reduce_scatter(*team, dtype_of(inp), inp.const_data_ptr(), out.mutable_data_ptr(),
                 static_cast<size_t>(out.numel()), static_cast<size_t>(inner));
}

void shm_broadcast_(Tensor x, int64_t root, int64_t handle, Order) {
  const TeamPtr team = teams().get(handle);
  const int from = check_rank("broadcast", "src", *team, root);
  check("broadcast", "x", x);
  broadcast(*team, dtype_of(x), x.mutable_data_ptr(), bytes_of(x), from);
}

void shm_send(Tensor x, int64_t dst, int64_t handle, Order) {
  const TeamPtr team = teams().get(handle);
  const int to = check_rank("send", "dst", *team, dst, true);
  check("send", "x", x);
  send(*team, dtype_of(x), x.const_data_ptr(), bytes_of(x), to);
}

void shm_recv_(Tensor x, int64_t src, int64_t handle, Order) {
  const TeamPtr team = teams().get(handle);
  const int from = check_rank("recv", "src", *team, src, true);
  check("recv", "x", x);
  recv(*team, dtype_of(x), x.mutable_data_ptr(), bytes_of(x), from);
}

int64_t shm_next_message_bytes(int64_t src, int64_t handle) {
  const TeamPtr team = teams().get(handle);
  const int from = check_rank("recv", "src", *team, src, true);
  return static_cast<int64_t>(next_message_bytes(*team, from));
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
  m.def("shm_barrier(int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_all_reduce_(Tensor(a!) x, int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_all_reduce_out(Tensor(a!) out, Tensor inp, int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_all_reduce(Tensor x, int handle, Tensor(z!)? order=None) -> Tensor");
  m.def(
      "shm_all_gather(Tensor(a!) out, Tensor inp, int inner, int handle, Tensor(z!)? order=None) "
      "-> ()");
  m.def(
      "shm_gather(Tensor(a!)? out, Tensor inp, int inner, int root, int handle, Tensor(z!)? "
      "order=None) -> ()");
  m.def(
      "shm_reduce_scatter(Tensor(a!) out, Tensor inp, int inner, int handle, Tensor(z!)? "
      "order=None) -> ()");
  m.def("shm_broadcast_(Tensor(a!) x, int root, int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_send(Tensor x, int dst, int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_recv_(Tensor(a!) x, int src, int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_next_message_bytes(int src, int handle) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(communicators, CompositeExplicitAutograd, m) {
  m.impl("shm_open", torch_glue::boxed<&shm_open>);
  m.impl("shm_address", torch_glue::boxed<&shm_address>);
  m.impl("shm_join", torch_glue::boxed<&shm_join>);
  m.impl("shm_close", torch_glue::boxed<&shm_close>);
  m.impl("shm_set_tuning", torch_glue::boxed<&shm_set_tuning>);
  m.impl("shm_plan", torch_glue::boxed<&shm_plan>);
  m.impl("shm_barrier", torch_glue::boxed<&shm_barrier>);
  m.impl("shm_next_message_bytes", torch_glue::boxed<&shm_next_message_bytes>);
}

STABLE_TORCH_LIBRARY_IMPL(communicators, CPU, m) {
  m.impl("shm_all_reduce_", torch_glue::boxed<&shm_all_reduce_>);
  m.impl("shm_all_reduce_out", torch_glue::boxed<&shm_all_reduce_out>);
  m.impl("shm_all_reduce", torch_glue::boxed<&shm_all_reduce>);
  m.impl("shm_all_gather", torch_glue::boxed<&shm_all_gather>);
  m.impl("shm_gather", torch_glue::boxed<&shm_gather>);
  m.impl("shm_reduce_scatter", torch_glue::boxed<&shm_reduce_scatter>);
  m.impl("shm_broadcast_", torch_glue::boxed<&shm_broadcast_>);
  m.impl("shm_send", torch_glue::boxed<&shm_send>);
  m.impl("shm_recv_", torch_glue::boxed<&shm_recv_>);
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
