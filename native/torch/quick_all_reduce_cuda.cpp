// The torch operator over quick::QuickAllReduce, for torch.compile. `fa` is the handle that
// communicators_quick_ar_create() made, `codec` a quick::Codec.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "collectives/quick_all_reduce.h"
#include "prim/gpu.h"
#include "torch/dtypes.h"
#include "torch/stream.h"

namespace {

using prim::require;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch_glue::dtype_of;

// `order` is written to a compiler alone, which keeps the order of what writes it
// (communicators/groups/traced.py).
void quick_all_reduce(int64_t fa, Tensor inp, Tensor out, int64_t codec,
                      std::optional<Tensor> /*order*/) {
  constexpr const char* op = "quick_all_reduce(fa, inp, out, codec)";
  const auto found = collectives::find_as<quick::QuickAllReduce>(fa);
  quick::QuickAllReduce& communicator = *found;
  const auto dtype = dtype_of(inp);
  require(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
          ": it sums float16 and bfloat16");
  require(dtype_of(out) == dtype && inp.numel() == out.numel(), op,
          ": inp and out must have the same dtype and size");
  require(inp.is_cuda() && out.is_cuda() && inp.get_device_index() == communicator.device() &&
              out.get_device_index() == communicator.device(),
          op, ": inp and out must be on cuda:", communicator.device());
  require(inp.is_contiguous() && out.is_contiguous(), op, ": inp and out must be contiguous");
  require(codec >= 0 && codec <= 3, op, ": codec must be 0 to 3, got ", codec);
  const gpu::DeviceGuard guard(communicator.device());
  communicator.run(static_cast<quick::Codec>(codec),
                   dtype == ScalarType::BFloat16 ? DType::kBFloat16 : DType::kFloat16,
                   inp.const_data_ptr(), out.mutable_data_ptr(),
                   static_cast<uint64_t>(inp.numel()) * 2,
                   torch_glue::current_stream(communicator.device()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(communicators, CUDA, m) {
  m.impl("quick_all_reduce", torch_glue::boxed<&quick_all_reduce>);
}
