"""Values that are awkward to pickle, for the tests of every channel that carries objects."""

from __future__ import annotations

import threading
from collections import ChainMap, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from communicators.groups.tensor_dict import TensorLike

Point = namedtuple("Point", "x y")


class Sub(torch.Tensor):
    """A tensor subclass without behaviour of its own."""


class Poison:
    """Pickles, and raises where it is unpickled."""

    def __init__(self, error: type[BaseException] = ZeroDivisionError) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _explode, (self.error, "boom")


def _explode(error: type[BaseException], text: str) -> Any:
    raise error(text)


class Holder:
    """An object with a tensor in it, and a way back to itself."""

    def __init__(self) -> None:
        self.tensor = torch.arange(6.0).view(2, 3).t()
        self.itself = self


def some(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The same numbers on every rank."""
    return torch.linspace(-2, 3, count).to(dtype)


def pairs(count: int) -> torch.Tensor:
    """Complex numbers."""
    return torch.complex(some(count), some(count) + 1)


def with_attribute() -> torch.Tensor:
    x = torch.arange(4.0)
    x.note = "kept"  # type: ignore[attr-defined]
    return x


def in_itself() -> dict[str, Any]:
    d: dict[str, Any] = {"x": torch.arange(3), "list": [torch.ones(2)]}
    d["self"] = d
    d["list"].append(d["list"])
    return d


def module() -> torch.nn.Module:
    linear = torch.nn.Linear(3, 2)
    linear.weight.data = some(600).view(2, 300)[:, :3]
    linear.bias.data = some(2)
    return linear


def twice() -> dict[str, Any]:
    x = torch.arange(5.0)
    return {"a": x, "b": x, "parts": [x, x[1:3]]}


def big() -> torch.Tensor:
    return torch.arange(1 << 20, dtype=torch.float32)


#: Single tensors: they arrive as they are, in objects and in dicts.
TENSORS: dict[str, Callable[[], torch.Tensor]] = {
    "view": lambda: big()[7:11],
    "column": lambda: big().view(1024, 1024)[:, 5],
    "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
    "expanded": lambda: torch.ones(1, 3).expand(500, 3),
    "unfolded": lambda: torch.arange(10.0).unfold(0, 4, 1),
    "channels last": lambda: some(120).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "0-dim": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(3, 0, 2),
    "empty view": lambda: big()[5:5],
    "bool": lambda: torch.tensor([True, False]),
    "bf16": lambda: some(5).bfloat16(),
    "fp8": lambda: some(5).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.arange(5).to(torch.uint16),
    "complex64": lambda: pairs(4),
    "complex32": lambda: pairs(4).to(torch.complex32),
    "conj": lambda: pairs(4).conj(),
    "conj of a view": lambda: pairs(4000).conj()[4:9:2],
    "neg": lambda: torch._neg_view(torch.arange(4.0)),
    "conj imag": lambda: pairs(4).conj().imag,
    "parameter": lambda: torch.nn.Parameter(torch.arange(3.0)),
    "parameter of a view": lambda: torch.nn.Parameter(big()[3:6], requires_grad=False),
    "buffer": lambda: torch.nn.Buffer(torch.arange(3.0)),
    "requires grad": lambda: torch.arange(3.0, requires_grad=True),
    "not a leaf": lambda: torch.arange(3.0, requires_grad=True)[1:],
    "conj with grad": lambda: pairs(3).requires_grad_().conj(),
    "subclass": lambda: torch.arange(4.0).as_subclass(Sub),
    "subclass of a view": lambda: big()[3:6].as_subclass(Sub),
    "attribute": with_attribute,
    "inference": lambda: torch.inference_mode()(lambda: torch.arange(4.0))(),
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "quantized": lambda: torch.quantize_per_tensor(some(5), 0.1, 3, torch.quint8),
    "quantized view": lambda: torch.quantize_per_tensor(big(), 0.1, 3, torch.quint8)[2:5],
    "one element of stride 2": lambda: big()[2:4:2].view(1, 1),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.zeros(3)], layout=torch.jagged
    ),
}

#: What makes a process import torch's compiler, some seconds: left to tests of one process.
SLOW_TO_MAKE = {"jagged", "fake"}

#: Other objects, any of which may hold tensors.
OBJECTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "int keys": lambda: {1: torch.ones(1), None: 2, (1, 2): "x", b"b": 1.5},
    "ordered": lambda: OrderedDict([("b", torch.ones(2)), ("a", 1)]),
    "default": lambda: defaultdict(list, {"x": [torch.ones(2)]}),
    "user dict": lambda: UserDict({"x": torch.ones(2)}),
    "chain": lambda: ChainMap({"x": torch.ones(2)}, {"y": 1}),
    "lists": lambda: {"l": [torch.arange(3), [torch.ones(2)]], "t": (torch.zeros(1), {"d": 1})},
    "named tuple": lambda: Point(torch.arange(3), [Point(1, 2)]),
    "twice": twice,
    "in itself": in_itself,
    "object": Holder,
    "tensor like": lambda: {"x": TensorLike((2,), torch.float32, "cpu"), "y": torch.ones(1)},
    "array": lambda: {"a": np.arange(10_000).reshape(100, 100)[::7, 3], "f": np.float32(1.5)},
    "module": module,
    "long": lambda: b"x" * ((8 << 20) + 1),
    "long tensor": lambda: torch.arange(5 << 20, dtype=torch.int16),
}


def freed() -> torch.Tensor:
    x = torch.ones(3)
    x.untyped_storage().resize_(0)
    return x


def deep() -> list[Any]:
    nest: list[Any] = []
    for _ in range(100_000):
        nest = [nest]
    return nest


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(3)


def batched() -> torch.Tensor:
    found: list[torch.Tensor] = []
    torch.vmap(lambda x: found.append(x) or x)(torch.ones(3, 2))
    return found[0]


class Sulky:
    """Raises an error of its own when it is pickled."""

    def __reduce__(self) -> Any:
        raise KeyError("not today")


#: What cannot be pickled.
REFUSED: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda: 0,
    "generator": lambda: (i for i in range(3)),
    "lock": lambda: threading.Lock(),
    "local class": lambda: type("Local", (), {})(),
    "sulky": Sulky,
    "deep": deep,
    "freed": freed,
    "fake": fake,
    "batched": batched,
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
    "after much else": lambda: [torch.ones(1000), b"x" * 100_000, lambda: 0],
}


def same(a: Any, b: Any, seen: set[tuple[int, int]] | None = None) -> bool:
    """Same types, and for tensors dtypes, layouts, shapes and bits, through every container."""
    seen = set() if seen is None else seen
    if (id(a), id(b)) in seen:
        return True
    seen.add((id(a), id(b)))
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return _same_tensor(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and bool(np.array_equal(a, b))
    if isinstance(a, (dict, UserDict)):
        return list(a) == list(b) and all(same(a[key], b[key], seen) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, seen) for x, y in zip(a, b, strict=True))
    if isinstance(a, (Holder, torch.nn.Module, ChainMap)):
        return same(vars(a), vars(b), seen)
    return bool(a == b)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    kinds = [(x.dtype, x.layout, x.requires_grad, x.is_quantized, x.is_nested) for x in (a, b)]
    if kinds[0] != kinds[1]:
        return False
    if getattr(a, "note", None) != getattr(b, "note", None):
        return False
    a, b = a.detach(), b.detach()
    if a.is_nested:
        return all(map(torch.equal, a.unbind(), b.unbind()))
    if a.shape != b.shape:
        return False
    if a.layout is not torch.strided:
        return torch.equal(a.to_dense(), b.to_dense())
    if a.is_quantized:
        return torch.equal(a, b)
    whole = [x.as_subclass(torch.Tensor).resolve_conj().resolve_neg() for x in (a, b)]
    flat = [x.contiguous().as_strided([x.numel()], [1]) for x in whole]
    return torch.equal(*(x.view(torch.uint8) for x in flat))
