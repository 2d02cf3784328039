"""The collectives as operators, by which a traced graph calls them.

torch.compile cannot trace into a communicator, so inside a traced function the coordinator calls
an operator that names the group; at run time the operator finds it (open_groups.py) and calls the
method of the same name. To a compiler an operator is a function of its arguments: one whose result
nobody uses may be dropped, and two that share nothing may change places. A collective that one rank
drops or moves leaves the others waiting. So each operator also *writes* an argument that all of
them share, `order`: what writes is kept, and what writes the same tensor keeps its order, whichever
group it is of. Nothing is ever written there.

(torch's own effect tokens, `_register_effectful_op`, would say the same; inductor drops the order
between them in torch 2.13, pytorch/pytorch#188301.)

A new collective is one more entry below: its parameters, and what its result looks like.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from .open_groups import open_group

#: Once a group or a communicator is open: the tensor of order_tensor().
_order: list[Tensor] = []


def order_tensor(device: torch.device | str = "cpu") -> Tensor:
    """What all collectives of this process write, to a compiler; made on the first `device`.

    That is the one where the tensors are, in a job of one device per rank: inductor puts nothing in
    a CUDA graph beside a tensor in host memory, or one that is written and has no fixed address.
    """
    if not _order:
        with torch.inference_mode(False):  # it is written in inference mode and out of it
            _order.append(torch.zeros(1, device=device))
        _order[0]._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    return _order[0]


def keep(operator: torch._ops.OpOverload) -> None:
    """No compiler removes calls of `operator`, also where they come without `order`."""
    has_side_effect(operator)


def _collective(parameters: str, result: str = "Tensor") -> Callable[[Callable[..., Any]], None]:
    """Registers `communicators::group_<name>` for the collective of the fake's name.

    Args:
        parameters: the schema's, by the names that GroupCoordinator's method has, and `group`.
            `rank` and `world_size` are there for the fake, which looks at nothing but its
            arguments: compiled graphs are cached, for other ranks and other jobs, too.
        result: the schema's; "()" where the method's result is None or its own argument.
    """

    def register(fake: Callable[..., Any]) -> None:
        name = fake.__name__
        names = list(inspect.signature(fake).parameters)
        schema = f"({parameters}, Tensor(z!)? order=None) -> {result}"

        def call(*given: Any) -> Tensor | None:
            arguments = dict(zip(names, given, strict=False))  # without order, and defaults
            group = open_group(arguments.pop("group"))
            arguments.pop("rank", None)
            arguments.pop("world_size", None)
            found: Tensor | None = getattr(group, name)(**arguments)
            if result == "()":
                return None
            return arguments["x"].new_empty(0) if found is None else found

        def describe(*given: Any) -> Any:
            return fake(*given[: len(names)])

        operator = torch.library.custom_op(
            f"communicators::group_{name}",
            call,
            mutates_args=re.findall(r"Tensor\(\w!\)\?? (\w+)", schema),
            schema=schema,
        )
        operator.register_fake(describe)
        keep(operator._opoverload)

    return register


@_collective('Tensor x, str group, bool exact=False, str op="sum"')
def all_reduce(x: Tensor, group: str, exact: bool = False, op: str = "sum") -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_collective('Tensor(a!) x, str group, bool exact=False, str op="sum"', "()")
def all_reduce_(x: Tensor, group: str, exact: bool = False, op: str = "sum") -> None:
    return None


@_collective('Tensor x, int dst, int rank, str group, str op="sum"')
def reduce(x: Tensor, dst: int, rank: int, group: str, op: str = "sum") -> Tensor:
    """Empty where the method returns None."""
    return torch.empty_like(x) if rank == dst else x.new_empty(0)


@_collective("Tensor x, SymInt[] output_split_sizes, SymInt[] input_split_sizes, str group")
def all_to_all_single(
    x: Tensor, output_split_sizes: list[int], input_split_sizes: list[int], group: str
) -> Tensor:
    return _resized(x, 0, lambda size: sum(output_split_sizes))


@_collective("Tensor x, int dim, int world_size, str group")
def reduce_scatter(x: Tensor, dim: int, world_size: int, group: str) -> Tensor:
    return _resized(x, dim, lambda size: size // world_size)


@_collective("Tensor x, SymInt[] sizes, int dim, int rank, str group")
def reduce_scatterv(x: Tensor, sizes: list[int], dim: int, rank: int, group: str) -> Tensor:
    return _resized(x, dim, lambda size: sizes[rank])


@_collective("Tensor x, int dim, int world_size, str group")
def all_gather(x: Tensor, dim: int, world_size: int, group: str) -> Tensor:
    return _resized(x, dim, lambda size: size * world_size)


@_collective("Tensor x, SymInt[] sizes, int dim, str group")
def all_gatherv(x: Tensor, sizes: list[int], dim: int, group: str) -> Tensor:
    return _resized(x, dim, lambda size: sum(sizes))


@_collective("Tensor x, int dst, int dim, int world_size, int rank, str group")
def gather(x: Tensor, dst: int, dim: int, world_size: int, rank: int, group: str) -> Tensor:
    """Empty where the method returns None."""
    return _resized(x, dim, lambda size: size * world_size) if rank == dst else x.new_empty(0)


@_collective("Tensor(a!) x, int src, str group", "()")
def broadcast(x: Tensor, src: int, group: str) -> None:
    return None


@_collective("Tensor(a!) x, Tensor[]? tensors, int src, str group", "()")
def scatter(x: Tensor, tensors: list[Tensor] | None, src: int, group: str) -> None:
    return None


@_collective("Tensor x, int dst, str group", "()")
def send(x: Tensor, dst: int, group: str) -> None:
    return None


@_collective("SymInt[] size, ScalarType dtype, int src, Device device, str group")
def recv(size: list[int], dtype: torch.dtype, src: int, device: torch.device, group: str) -> Tensor:
    return torch.empty(size, dtype=dtype, device=device)


@_collective("str group", "()")
def barrier(group: str) -> None:
    return None


def _resized(x: Tensor, dim: int, size: Callable[[Any], Any]) -> Tensor:
    """A contiguous tensor like `x` with another size along `dim`; one of 0 dims has 1 element."""
    shape = list(x.shape) or [1]
    shape[dim] = size(shape[dim])
    return x.new_empty(shape)
