// Argument checks of the kvcache ops. Each throws one sentence: the op, the argument, what was
// given, what is accepted. Nothing is written before all checks of an op have passed.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "prim/dtype.h"
#include "torch/errors.h"

namespace kvcache_glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string name_of(ScalarType dtype);
std::string device_name(int32_t type, int32_t index);

// One tensor argument, its metadata read once.
struct Arg {
  Arg(const char* name, const Tensor& tensor);

  const char* name;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
  ScalarType dtype;
  int32_t device_type, device_index;
  int64_t item;  // bytes
  void* data;

  int64_t size(int64_t d) const { return sizes[d < 0 ? d + dim : d]; }
  int64_t stride(int64_t d) const { return strides[d < 0 ? d + dim : d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dim; ++d) n *= sizes[d];
    return n;
  }
  // Dimensions from `first` on are laid out densely (dimensions of one element have no say).
  bool dense_from(int64_t first) const {
    int64_t expected = 1;
    for (int64_t d = dim - 1; d >= first; --d) {
      if (sizes[d] != 1 && strides[d] != expected) return numel() == 0;
      expected *= sizes[d];
    }
    return true;
  }
  std::string shape() const;
};

class Checks {
 public:
  // `anchor` is the tensor whose device the others must share.
  Checks(const char* op, const Arg& anchor)
      : op_(op),
        anchor_(anchor.name),
        device_type_(anchor.device_type),
        device_index_(anchor.device_index) {}

  [[noreturn]] void fail(const char* arg, const std::string& given,
                         const std::string& accepted) const;

  void on_device(const Arg& a) const;
  void rank(const Arg& a, int64_t low, int64_t high) const;
  // -1 accepts any size.
  void shape(const Arg& a, std::initializer_list<int64_t> expected) const;
  void size(const Arg& a, int64_t d, int64_t expected, const char* what) const;
  void at_least(const Arg& a, int64_t d, int64_t least, const char* what) const;
  void same_shape(const Arg& a, const Arg& other) const;
  void dtype(const Arg& a, ScalarType expected) const;
  DType float_dtype(const Arg& a) const;  // fp32, fp16 or bf16
  DType sixteen_bit(const Arg& a) const;  // fp16 or bf16
  void last_contiguous(const Arg& a) const { dense_from(a, a.dim - 1); }
  void contiguous(const Arg& a) const { dense_from(a, 0); }
  void dense_from(const Arg& a, int64_t first) const;
  // Values of scalars: `given` is printed when `ok` is false.
  void value(bool ok, const char* arg, int64_t given, const char* accepted) const;

  const char* op() const { return op_; }

 private:
  const char *op_, *anchor_;
  int32_t device_type_, device_index_;
};

// The format named by "fp8", "fp8_e4m3" or "fp8_e5m2"; raises for any other text.
KvFormat parse_fp8(const Checks& checks, const char* arg, const std::string& text);

inline int64_t item_bytes(const Arg& a) { return a.item; }

// The address that kernels read host memory at: itself on the CPU; on a GPU the device's address of
// pinned memory, and an error for any other. Defined once a library.
const uint8_t* host_pointer(const Checks& checks, const Arg& host);

// The current stream of the current device (null on the CPU). Defined once a library.
Stream current_stream();

// Makes the tensors' device current and names the stream to launch on (null on the CPU). Defined
// once a library.
class Launch {
 public:
  explicit Launch(const Arg& where);
  ~Launch();
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  Stream stream = nullptr;
  void* guard = nullptr;  // a gpu::DeviceGuard; null on the CPU
};

}  // namespace kvcache_glue
