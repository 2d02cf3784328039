// The torch operators over CustomAllReduce, for torch.compile and for callers of the functional
// interface. `fa` is the handle that communicators_custom_ar_create() made.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "collectives/custom_all_reduce.h"
#include "torch/dtypes.h"
#include "torch/stream.h"

namespace {

using collectives::CustomAllReduce;
using prim::require;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch_glue::dtype_of;

// Written to a compiler alone, which keeps the order of what writes it
// (communicators/groups/traced.py).
using Order = std::optional<Tensor>;

DType sum_dtype(const Tensor& x, const char* op) {
  switch (dtype_of(x)) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      prim::fail(prim::kInvalid, op, ": it sums float32, float16 and bfloat16");
  }
}

// Checks what all three operators need: both tensors contiguous, of one dtype, on the device of fa,
// and inp * inp_parts == out * out_parts in elements.
void check_pair(const CustomAllReduce& c, const Tensor& inp, const Tensor& out, int64_t inp_parts,
                int64_t out_parts, const char* op) {
  require(inp.is_cuda() && out.is_cuda() && inp.get_device_index() == c.device() &&
              out.get_device_index() == c.device(),
          op, ": inp and out must be on cuda:", c.device());
  require(inp.is_contiguous() && out.is_contiguous(), op, ": inp and out must be contiguous");
  require(dtype_of(inp) == dtype_of(out), op, ": inp and out must have the same dtype");
  require(inp.numel() * inp_parts == out.numel() * out_parts, op, ": inp has ", inp.numel(),
          " elements and out ", out.numel());
}

uint64_t bytes_of(const Tensor& x) {
  return static_cast<uint64_t>(x.numel()) * static_cast<uint64_t>(x.element_size());
}

void all_reduce(int64_t fa, Tensor inp, Tensor out, Order) {
  constexpr const char* op = "custom_ar_all_reduce(fa, inp, out)";
  const auto found = collectives::find_as<CustomAllReduce>(fa);
  CustomAllReduce& c = *found;
  check_pair(c, inp, out, 1, 1, op);
  const gpu::DeviceGuard guard(c.device());
  c.all_reduce(sum_dtype(inp, op), inp.const_data_ptr(), out.mutable_data_ptr(), bytes_of(inp),
               torch_glue::current_stream(c.device()));
}

void all_gather(int64_t fa, Tensor inp, Tensor out, int64_t world, Order) {
  constexpr const char* op = "custom_ar_all_gather(fa, inp, out, world)";
  const auto found = collectives::find_as<CustomAllReduce>(fa);
  CustomAllReduce& c = *found;
  check_pair(c, inp, out, world, 1, op);
  const gpu::DeviceGuard guard(c.device());
  c.all_gather(inp.const_data_ptr(), out.mutable_data_ptr(), bytes_of(inp),
               torch_glue::current_stream(c.device()));
}

void reduce_scatter(int64_t fa, Tensor inp, Tensor out, int64_t world, Order) {
  constexpr const char* op = "custom_ar_reduce_scatter(fa, inp, out, world)";
  const auto found = collectives::find_as<CustomAllReduce>(fa);
  CustomAllReduce& c = *found;
  check_pair(c, inp, out, 1, world, op);
  const gpu::DeviceGuard guard(c.device());
  c.reduce_scatter(sum_dtype(inp, op), inp.const_data_ptr(), out.mutable_data_ptr(), bytes_of(out),
                   torch_glue::current_stream(c.device()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(communicators, m) {
  m.def("custom_ar_all_reduce(int fa, Tensor inp, Tensor(a!) out, Tensor(z!)? order=None) -> ()");
  m.def(
      "custom_ar_all_gather(int fa, Tensor inp, Tensor(a!) out, int world, Tensor(z!)? order=None) "
      "-> ()");
  m.def(
      "custom_ar_reduce_scatter(int fa, Tensor inp, Tensor(a!) out, int world, Tensor(z!)? "
      "order=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(communicators, CUDA, m) {
  m.impl("custom_ar_all_reduce", torch_glue::boxed<&all_reduce>);
  m.impl("custom_ar_all_gather", torch_glue::boxed<&all_gather>);
  m.impl("custom_ar_reduce_scatter", torch_glue::boxed<&reduce_scatter>);
}
