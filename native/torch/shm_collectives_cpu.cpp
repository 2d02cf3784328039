// The operators of the collectives over CPU shared memory: argument checks and registration. What
// they do is in native/shm.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "shm/channel.h"
#include "shm/collectives.h"
#include "shm/reduce.h"
#include "torch/dtypes.h"
#include "torch/shm_teams.h"

namespace {

using shm::name_of;
using torch::stable::Tensor;
using torch_glue::team_of;
using torch_glue::TeamPtr;

// What every collective writes, to a compiler, and none reads or writes: it keeps their order
// (communicators/groups/traced.py).
using Order = std::optional<Tensor>;

DType dtype_of(const Tensor& x) { return static_cast<DType>(torch_glue::dtype_of(x)); }

size_t bytes_of(const Tensor& x) { return static_cast<size_t>(x.numel()) * x.element_size(); }

[[noreturn]] void reject(const char* op, const std::string& what) {
  prim::fail(prim::kInvalid, op, ": ", what);
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

void check_reduced(const char* op, const Tensor& x,
                   shm::Reduction reduction = shm::Reduction::kSum) {
  if (reduced_size(reduction, dtype_of(x)) != 0) return;
  const std::string kind = name_of(reduction);
  if (kind == "sum" || kind == "avg") {
    reject(op, "dtype " + name_of(dtype_of(x)) + " cannot be " +
                   (kind == "sum" ? "summed" : "averaged") +
                   "; float32, float16, bfloat16, float64, int8 to int64 and uint8 can");
  }
  reject(op, "dtype " + name_of(dtype_of(x)) + " cannot be reduced by " + kind +
                 (kind[0] == 'b' ? "; integers and bool can"
                                 : "; float32, float16, bfloat16, float64, integers and bool can"));
}

shm::Reduction reduction_of(const char* op, int64_t reduction) {
  if (reduction < 0 || reduction > static_cast<int64_t>(shm::Reduction::kXor)) {
    reject(op, "reduction=" + std::to_string(reduction) + " is not one of 0 to 7");
  }
  return static_cast<shm::Reduction>(reduction);
}

// Sizes in elements, one a rank, as bytes; they make up `x`.
std::vector<uint64_t> bytes_of_parts(const char* op, const char* argument, const Tensor& x,
                                     const std::vector<int64_t>& sizes, int world_size) {
  int64_t total = 0;
  std::vector<uint64_t> bytes;
  for (const int64_t size : sizes) {
    if (size < 0) reject(op, std::string(argument) + " has a size of " + std::to_string(size));
    total += size;
    bytes.push_back(static_cast<uint64_t>(size) * x.element_size());
  }
  if (static_cast<int>(sizes.size()) != world_size || total != x.numel()) {
    reject(op, std::string(argument) + " has " + std::to_string(sizes.size()) +
                   " sizes that make up " + std::to_string(total) + " elements; " +
                   std::to_string(world_size) + " are expected, for " + std::to_string(x.numel()));
  }
  return bytes;
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

void shm_barrier(int64_t handle, Order) { barrier(*team_of(handle)); }

void shm_all_reduce_(Tensor x, int64_t handle, Order) {
  check("all_reduce_", "x", x);
  check_reduced("all_reduce_", x);
  void* data = x.mutable_data_ptr();
  all_reduce(*team_of(handle), dtype_of(x), data, data, static_cast<size_t>(x.numel()));
}

void shm_all_reduce_out(Tensor out, Tensor inp, int64_t handle, Order) {
  check_pair("all_reduce", out, inp, 1, 1);
  check_reduced("all_reduce", inp);
  all_reduce(*team_of(handle), dtype_of(inp), inp.const_data_ptr(), out.mutable_data_ptr(),
             static_cast<size_t>(inp.numel()));
}

Tensor shm_all_reduce(Tensor x, int64_t handle, Order) {
  check("all_reduce", "x", x);
  Tensor out = torch::stable::empty_like(x);
  shm_all_reduce_out(out, x, handle, std::nullopt);
  return out;
}

void shm_all_gather(Tensor out, Tensor inp, int64_t inner, int64_t handle, Order) {
  const TeamPtr team = team_of(handle);
  check_pair("all_gather", out, inp, 1, team->world_size());
  check_inner("all_gather", inner, inp.numel());
  all_gather(*team, dtype_of(inp), inp.const_data_ptr(), out.mutable_data_ptr(), bytes_of(inp),
             static_cast<size_t>(inner) * inp.element_size());
}

void shm_gather(std::optional<Tensor> out, Tensor inp, int64_t inner, int64_t root, int64_t handle,
                Order) {
  const TeamPtr team = team_of(handle);
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
  const TeamPtr team = team_of(handle);
  check_pair("reduce_scatter", out, inp, team->world_size(), 1);
  check_reduced("reduce_scatter", inp);
  check_inner("reduce_scatter", inner, out.numel());
  reduce_scatter(*team, dtype_of(inp), inp.const_data_ptr(), out.mutable_data_ptr(),
                 static_cast<size_t>(out.numel()), static_cast<size_t>(inner));
}

// The sums above have operators of their own: an argument more costs as much as a small sum takes.
void shm_all_reduce_by(Tensor out, Tensor inp, int64_t reduction, int64_t handle, Order) {
  const auto by = reduction_of("all_reduce", reduction);
  check_pair("all_reduce", out, inp, 1, 1);
  check_reduced("all_reduce", inp, by);
  all_reduce(*team_of(handle), dtype_of(inp), inp.const_data_ptr(), out.mutable_data_ptr(),
             static_cast<size_t>(inp.numel()), by);
}

void shm_reduce_scatter_by(Tensor out, Tensor inp, int64_t inner, int64_t reduction, int64_t handle,
                           Order) {
  const auto by = reduction_of("reduce_scatter", reduction);
  const TeamPtr team = team_of(handle);
  check_pair("reduce_scatter", out, inp, team->world_size(), 1);
  check_reduced("reduce_scatter", inp, by);
  check_inner("reduce_scatter", inner, out.numel());
  reduce_scatter(*team, dtype_of(inp), inp.const_data_ptr(), out.mutable_data_ptr(),
                 static_cast<size_t>(out.numel()), static_cast<size_t>(inner), by);
}

void shm_reduce(std::optional<Tensor> out, Tensor inp, int64_t root, int64_t reduction,
                int64_t handle, Order) {
  const auto by = reduction_of("reduce", reduction);
  const TeamPtr team = team_of(handle);
  const int to = check_rank("reduce", "root", *team, root);
  check("reduce", "inp", inp);
  check_reduced("reduce", inp, by);
  void* data = nullptr;
  if (to == team->rank()) {
    if (!out) reject("reduce", "rank " + std::to_string(to) + " is the root and has no out");
    check_pair("reduce", *out, inp, 1, 1);
    data = out->mutable_data_ptr();
  }
  reduce(*team, dtype_of(inp), inp.const_data_ptr(), data, static_cast<size_t>(inp.numel()), to,
         by);
}

void shm_scatter(Tensor out, std::optional<Tensor> inp, int64_t root, int64_t handle, Order) {
  const TeamPtr team = team_of(handle);
  const int from = check_rank("scatter", "root", *team, root);
  check("scatter", "out", out);
  const void* data = nullptr;
  if (from == team->rank()) {
    if (!inp) reject("scatter", "rank " + std::to_string(from) + " is the root and has no inp");
    check_pair("scatter", out, *inp, team->world_size(), 1);
    data = inp->const_data_ptr();
  }
  scatter(*team, dtype_of(out), data, out.mutable_data_ptr(), bytes_of(out), from);
}

// `to` and `from`: elements for each rank and from each.
void shm_all_to_all(Tensor out, Tensor inp, std::vector<int64_t> to, std::vector<int64_t> from,
                    int64_t handle, Order) {
  const TeamPtr team = team_of(handle);
  check("all_to_all", "out", out);
  check("all_to_all", "inp", inp);
  if (dtype_of(out) != dtype_of(inp)) {
    reject("all_to_all", "out is " + name_of(dtype_of(out)) + " and inp is " +
                             name_of(dtype_of(inp)) + "; they must have one dtype");
  }
  const auto sent = bytes_of_parts("all_to_all", "to", inp, to, team->world_size());
  const auto received = bytes_of_parts("all_to_all", "from", out, from, team->world_size());
  all_to_all(*team, dtype_of(inp), inp.const_data_ptr(), sent.data(), out.mutable_data_ptr(),
             received.data());
}

void shm_broadcast_(Tensor x, int64_t root, int64_t handle, Order) {
  const TeamPtr team = team_of(handle);
  const int from = check_rank("broadcast", "src", *team, root);
  check("broadcast", "x", x);
  broadcast(*team, dtype_of(x), x.mutable_data_ptr(), bytes_of(x), from);
}

void shm_send(Tensor x, int64_t dst, int64_t handle, Order) {
  const TeamPtr team = team_of(handle);
  const int to = check_rank("send", "dst", *team, dst, true);
  check("send", "x", x);
  send(*team, dtype_of(x), x.const_data_ptr(), bytes_of(x), to);
}

void shm_recv_(Tensor x, int64_t src, int64_t handle, Order) {
  const TeamPtr team = team_of(handle);
  const int from = check_rank("recv", "src", *team, src, true);
  check("recv", "x", x);
  recv(*team, dtype_of(x), x.mutable_data_ptr(), bytes_of(x), from);
}

int64_t shm_next_message_bytes(int64_t src, int64_t handle) {
  const TeamPtr team = team_of(handle);
  const int from = check_rank("recv", "src", *team, src, true);
  return static_cast<int64_t>(next_message_bytes(*team, from));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(communicators, m) {
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
  m.def(
      "shm_all_reduce_by(Tensor(a!) out, Tensor inp, int reduction, int handle, Tensor(z!)? "
      "order=None) -> ()");
  m.def(
      "shm_reduce_scatter_by(Tensor(a!) out, Tensor inp, int inner, int reduction, int handle, "
      "Tensor(z!)? order=None) -> ()");
  m.def(
      "shm_reduce(Tensor(a!)? out, Tensor inp, int root, int reduction, int handle, Tensor(z!)? "
      "order=None) -> ()");
  m.def(
      "shm_scatter(Tensor(a!) out, Tensor? inp, int root, int handle, Tensor(z!)? order=None) -> "
      "()");
  m.def(
      "shm_all_to_all(Tensor(a!) out, Tensor inp, int[] to, int[] from, int handle, Tensor(z!)? "
      "order=None) -> ()");
  m.def("shm_broadcast_(Tensor(a!) x, int root, int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_send(Tensor x, int dst, int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_recv_(Tensor(a!) x, int src, int handle, Tensor(z!)? order=None) -> ()");
  m.def("shm_next_message_bytes(int src, int handle) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(communicators, CompositeExplicitAutograd, m) {
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
  m.impl("shm_all_reduce_by", torch_glue::boxed<&shm_all_reduce_by>);
  m.impl("shm_reduce_scatter_by", torch_glue::boxed<&shm_reduce_scatter_by>);
  m.impl("shm_reduce", torch_glue::boxed<&shm_reduce>);
  m.impl("shm_scatter", torch_glue::boxed<&shm_scatter>);
  m.impl("shm_all_to_all", torch_glue::boxed<&shm_all_to_all>);
  m.impl("shm_broadcast_", torch_glue::boxed<&shm_broadcast_>);
  m.impl("shm_send", torch_glue::boxed<&shm_send>);
  m.impl("shm_recv_", torch_glue::boxed<&shm_recv_>);
}
