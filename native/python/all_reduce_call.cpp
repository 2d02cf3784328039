// The Python module `_native_all_reduce`: an all-reduce of GPU tensors in one call.
//
// A small all-reduce from Python is bound by the host. What there is to know of two tensors comes
// from torch through DLPack's table of C functions in a tenth of the time that Python takes to ask
// for it, and no call goes through ctypes. The CUDA library comes as an address and the GPU as a
// tensor on it, so host tensors and any function will do to test this.
#include <ATen/dlpack.h>
#include <Python.h>

#include <cstdint>

#include "prim/dtype.h"

namespace python {
namespace {

// communicators_custom_ar_all_reduce of native/collectives/c_api.cu.
using Function = int (*)(int64_t handle, int dtype, const void* inp, void* out, uint64_t bytes,
                         void* stream);

constexpr int kNotApplicable = -1;

struct AllReduceCall {
  PyObject_HEAD;
  Function function;
  int64_t handle;
  const DLPackExchangeAPI* torch;
  PyTypeObject* tensor_type;
  DLDevice device;
};

AllReduceCall* of(PyObject* self) { return reinterpret_cast<AllReduceCall*>(self); }

// False with an exception set, TypeError for what is no tensor.
bool look(const AllReduceCall& call, PyObject* object, DLTensor* tensor) {
  if (!PyObject_TypeCheck(object, call.tensor_type)) {
    PyErr_Format(PyExc_TypeError, "a torch.Tensor is expected, not %R", object);
    return false;
  }
  return call.torch->dltensor_from_py_object_no_sync(object, tensor) == 0;
}

// DType (prim/dtype.h), or kNotApplicable.
int number_of(DLDataType dtype) {
  if (dtype.lanes != 1) return kNotApplicable;
  if (dtype.code == kDLFloat && dtype.bits == 32) return static_cast<int>(DType::kFloat32);
  if (dtype.code == kDLFloat && dtype.bits == 16) return static_cast<int>(DType::kFloat16);
  if (dtype.code == kDLBfloat && dtype.bits == 16) return static_cast<int>(DType::kBFloat16);
  return kNotApplicable;
}

// How many elements, or kNotApplicable where they are not contiguous.
int64_t elements_of(const DLTensor& tensor) {
  int64_t count = 1;
  bool contiguous = true;
  for (int dim = tensor.ndim - 1; dim >= 0; --dim) {
    contiguous = contiguous && (tensor.shape[dim] == 1 || tensor.strides[dim] == count);
    count *= tensor.shape[dim];
  }
  return contiguous || count == 0 ? count : kNotApplicable;
}

bool is_on(DLDevice device, const DLTensor& tensor) {
  return tensor.device.device_type == device.device_type &&
         tensor.device.device_id == device.device_id;
}

char* data_of(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

// run(inp, out) -> the function's status, or kNotApplicable, with nothing done, where they
// are not contiguous on the GPU, not of one size and dtype, or of a dtype that is not summed.
PyObject* run(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  const AllReduceCall& call = *of(self);
  if (count != 2) return PyErr_Format(PyExc_TypeError, "run(inp, out) takes two tensors");
  DLTensor inp, out;
  if (!look(call, arguments[0], &inp) || !look(call, arguments[1], &out)) return nullptr;
  const int dtype = number_of(inp.dtype);
  const int64_t elements = elements_of(inp);
  if (!is_on(call.device, inp) || !is_on(call.device, out) || dtype == kNotApplicable ||
      dtype != number_of(out.dtype) || elements == kNotApplicable || elements != elements_of(out)) {
    return PyLong_FromLong(kNotApplicable);
  }
  void* stream = nullptr;
  if (call.torch->current_work_stream(call.device.device_type, call.device.device_id, &stream)) {
    return nullptr;
  }
  const uint64_t bytes = static_cast<uint64_t>(elements) * (inp.dtype.bits / 8);
  int status;
  // A launch waits where the queue of the device is full, perhaps for a rank on another thread.
  Py_BEGIN_ALLOW_THREADS;
  status = call.function(call.handle, dtype, data_of(inp), data_of(out), bytes, stream);
  Py_END_ALLOW_THREADS;
  return PyLong_FromLong(status);
}

// AllReduceCall(function, handle, example): an address, a number, and a tensor on the GPU of the
// calls.
PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject*) {
  unsigned long long function;
  long long handle;
  PyObject* example;
  if (!PyArg_ParseTuple(arguments, "KLO", &function, &handle, &example)) return nullptr;
  PyObject* capsule = PyObject_GetAttrString(example, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return nullptr;
  const auto* torch =
      static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (torch == nullptr) return nullptr;
  if (torch->header.version.major != DLPACK_MAJOR_VERSION) {
    return PyErr_Format(PyExc_ImportError, "torch has DLPack %u, and %u is expected",
                        torch->header.version.major, DLPACK_MAJOR_VERSION);
  }
  DLTensor on;
  if (torch->dltensor_from_py_object_no_sync(example, &on) != 0) return nullptr;
  PyObject* self = PyType_GenericAlloc(type, 0);
  if (self == nullptr) return nullptr;
  of(self)->function = reinterpret_cast<Function>(function);
  of(self)->handle = handle;
  of(self)->torch = torch;
  of(self)->tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(Py_TYPE(example)));
  of(self)->device = on.device;
  return self;
}

void dealloc(PyObject* self) {
  Py_XDECREF(of(self)->tensor_type);
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run)), METH_FASTCALL,
     nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot type_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec type_spec = {"_native_all_reduce.AllReduceCall", sizeof(AllReduceCall), 0,
                         Py_TPFLAGS_DEFAULT, type_slots};

int fill(PyObject* module) {
  if (PyModule_AddStringConstant(module, "version", COMMUNICATORS_VERSION) != 0) return -1;
  PyObject* type = PyType_FromSpec(&type_spec);
  if (type == nullptr) return -1;
  const int added = PyModule_AddObjectRef(module, "AllReduceCall", type);
  Py_DECREF(type);
  return added;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(fill)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_native_all_reduce",
    nullptr,
    0,
    nullptr,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace python

PyMODINIT_FUNC PyInit__native_all_reduce() { return PyModuleDef_Init(&python::definition); }
