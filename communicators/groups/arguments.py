"""Checks of arguments of collectives; each raises InvalidArgumentError, in a whole sentence.

They look at this rank's own arguments and move nothing, so a group whose ranks all pass the same
wrong thing is still in step afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ..base import BITS, BY
from ..errors import InvalidArgumentError

_WANTED = "a strided torch.Tensor with memory of its own is accepted"


def check_tensor(call: str, x: Any, rank: int, argument: str = "x") -> torch.Tensor:
    """`x`, with the sign and conjugation that a view leaves to be done; it may not be contiguous.

    InvalidArgumentError for what holds no plain numbers in strided memory: lists, arrays, sparse,
    mkldnn, nested and quantized tensors, and those without memory (meta, fake).
    """
    if (
        type(x) is torch.Tensor
        and x.is_cpu
        and x.layout is torch.strided
        and not (x.is_nested or x.is_quantized or x.is_neg() or x.is_conj())
    ):
        return x  # as nearly all are; the rest is asked one by one
    given = f"{call}({argument}) on rank {rank}: {argument} is "
    if not isinstance(x, torch.Tensor):
        raise InvalidArgumentError(f"{given}a {type(x).__name__}; {_WANTED}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise InvalidArgumentError(f"{given}a tensor of layout {kind}; {_WANTED}")
    if x.is_quantized:
        raise InvalidArgumentError(
            f"{given}quantized, {_name(x.dtype)}; {_WANTED}: send its int_repr() and its scales"
        )
    if x.device.type in _ADDRESSED and x.numel() and not _has_memory(x):
        raise InvalidArgumentError(
            f"{given}on {x.device}, a {type(x).__name__} without memory; {_WANTED}"
        )
    return x.resolve_conj().resolve_neg()


#: Devices whose tensors have an address; vendors' tensors may come without.
_ADDRESSED = frozenset({"cpu", "cuda"})


def _has_memory(x: torch.Tensor) -> bool:
    try:
        return x.data_ptr() != 0
    except RuntimeError:  # a subclass that only describes a tensor
        return False


def check_plain(call: str, x: Any, rank: int, argument: str = "x") -> None:
    """check_tensor for callers that read the memory as it is: conj and neg views are refused."""
    if check_tensor(call, x, rank, argument) is not x:
        view = "conjugated" if x.is_conj() else "negated"
        raise InvalidArgumentError(
            f"{call}({argument}) on rank {rank}: {argument} is a {view} view, whose memory holds "
            "other numbers; its resolve_conj().resolve_neg() is accepted"
        )


def check_in_place(call: str, x: Any, rank: int, argument: str = "x") -> torch.Tensor:
    """check_tensor of an `x` that receives the result; returns it in contiguous form.

    InvalidArgumentError where torch would not write: elements that share memory, an inference
    tensor outside of inference mode, a leaf, or a view, that requires grad.
    """
    if (
        type(x) is torch.Tensor
        and x.layout is torch.strided
        and x.is_contiguous()
        and not (x.requires_grad or x.is_inference() or x.is_neg() or x.is_conj() or x.is_nested)
    ):
        return x
    staged = check_tensor(call, x, rank, argument)
    given = f"{call}({argument}) on rank {rank} writes into {argument}, "
    if _overlaps(x):
        raise InvalidArgumentError(
            f"{given}of shape {list(x.shape)} and strides {list(x.stride())}, whose elements share "
            "memory (it is expanded, or a window); memory for each element is accepted"
        )
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise InvalidArgumentError(
            f"{given}an inference tensor, and inference mode is off; a normal tensor, or the call "
            "under torch.inference_mode(), is accepted"
        )
    if x.requires_grad and torch.is_grad_enabled() and (x.is_leaf or x._is_view()):
        raise InvalidArgumentError(
            f"{given}a {'leaf' if x.is_leaf else 'view'} that requires grad; a tensor that does "
            "not, or the call under torch.no_grad(), is accepted"
        )
    # Unlike contiguous(), clone() works on fake tensors of a device that torch lacks.
    contiguous = staged.is_contiguous()
    return staged if contiguous else staged.clone(memory_format=torch.contiguous_format)


def _overlaps(x: torch.Tensor) -> bool:
    """Whether two elements lie at one address."""
    dims = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True))
    reach = 0  # how far the inner dimensions go
    nested = True
    for stride, size in dims:
        if size > 1:
            if stride == 0:
                return bool(x.numel())
            nested = nested and stride > reach
            reach += stride * (size - 1)
    if nested or x.numel() == 0:
        return False
    # Interleaved dimensions: every address is looked at.
    offsets = torch.zeros(1, dtype=torch.int64)
    for stride, size in dims:
        offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
    return offsets.unique().numel() < offsets.numel()


def check_written(call: str, x: Any, rank: int, argument: str = "x") -> None:
    """check_in_place for callers that write the memory as it is: it must be contiguous, too."""
    if check_in_place(call, x, rank, argument) is not x:
        raise InvalidArgumentError(
            f"{call}({argument}) on rank {rank} writes into {argument}, which is not contiguous or "
            "is a conj or neg view; a contiguous tensor is accepted"
        )


def check_reduced(
    call: str,
    dtype: torch.dtype,
    known: Collection[torch.dtype],
    rank: int,
    argument: str = "x",
    by: str = "sum",
) -> None:
    """A dtype of `known` that can be reduced by `by` (reducible)."""
    if dtype not in known or not reducible(by, dtype):
        names = ", ".join(sorted(_name(one) for one in known if reducible(by, one)))
        how = {"sum": "summed", "avg": "averaged"}.get(by, f"reduced by {by}")
        raise InvalidArgumentError(
            f"{call}({argument}) on rank {rank}: {argument} is of dtype "
            f"{_name(dtype)}, and {_name(dtype)} cannot be {how}; {names} are accepted"
        )


def reducible(by: str, dtype: torch.dtype) -> bool:
    """Whether there is such a reduction of such numbers."""
    if by in ("sum", "avg"):
        return dtype is not torch.bool
    if by in ("min", "max"):
        return not dtype.is_complex
    return by not in BITS or not (dtype.is_floating_point or dtype.is_complex)


def check_by(call: str, by: Any, rank: int) -> str:
    """What a reduction reduces by, one of base.BY, also of a torch ReduceOp."""
    name = by if isinstance(by, str) else str(getattr(by, "op", by)).rpartition(".")[2]
    name = name.lower()
    if name not in BY:
        raise InvalidArgumentError(
            f"{call}(op={by!r}) on rank {rank}: {', '.join(BY)} are accepted, and torch's "
            "ReduceOps of these names"
        )
    return name


def check_dim(call: str, x: torch.Tensor, dim: int, rank: int) -> int:
    """`dim` as 0..ndim-1; a negative one counts from the end. A 0-dim tensor has dim 0."""
    dim = _integer(call, "dim", dim, rank)
    ndim = max(x.dim(), 1)
    if not -ndim <= dim < ndim:
        raise InvalidArgumentError(
            f"{call}(x, dim={dim}) on rank {rank}: x {list(x.shape)} has dims {-ndim}..{ndim - 1}"
        )
    return dim % ndim


def check_sizes(
    call: str,
    x: torch.Tensor,
    sizes: Sequence[int],
    world_size: int,
    rank: int,
    total: int | None = None,
) -> list[int]:
    """One size >= 0 a rank; with `total`, they add up to it. Returns them as a list."""
    found = _integers(call, "sizes", sizes, rank)
    wrong_total = total is not None and sum(found) != total
    if len(found) != world_size or min(found) < 0 or wrong_total:
        with_sum = "" if total is None else f" with sum {total}"
        raise InvalidArgumentError(
            f"{call}(x, sizes={found}) on rank {rank}: {world_size} sizes >= 0{with_sum} are "
            f"expected for x {list(x.shape)}"
        )
    return found


def check_root(call: str, argument: str, root: int, world_size: int, rank: int) -> int:
    """A rank of the group."""
    root = _integer(call, argument, root, rank)
    if not 0 <= root < world_size:
        raise InvalidArgumentError(
            f"{call}({argument}={root}) on rank {rank}: the ranks of this group are "
            f"0..{world_size - 1}"
        )
    return root


def check_peer(call: str, argument: str, peer: int, own: int, world_size: int) -> int:
    """Another rank of the group."""
    peer = check_root(call, argument, peer, world_size, own)
    if peer == own:
        raise InvalidArgumentError(f"{call}({argument}={peer}): that is this rank itself")
    return peer


def check_mapping(call: str, tensors: Any, own: int) -> None:
    """A dict, or another mapping."""
    if not isinstance(tensors, Mapping):
        raise InvalidArgumentError(
            f"{call}(tensors): a dict is expected on rank {own}, and a {type(tensors).__name__} "
            "was given"
        )


def check_new(
    call: str, size: Sequence[int], dtype: Any, device: Any, rank: int
) -> tuple[list[int], torch.device]:
    """The size and device of a tensor that is to be made for a result."""
    sizes = _integers(call, "size", size, rank)
    if any(one < 0 for one in sizes):
        raise InvalidArgumentError(f"{call}(size={sizes}) on rank {rank}: sizes >= 0 are expected")
    if not isinstance(dtype, torch.dtype) or dtype in _QUANTIZED:
        raise InvalidArgumentError(
            f"{call}(dtype={dtype!r}) on rank {rank}: a torch.dtype is expected, and none that is "
            "quantized"
        )
    try:
        return sizes, torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidArgumentError(
            f"{call}(device={device!r}) on rank {rank}: a device is expected, as torch.device takes"
        ) from None


_QUANTIZED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})


def _integer(call: str, argument: str, value: Any, rank: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        if not isinstance(value, (bool, torch.Tensor)):
            return operator.index(value)  # numpy's integers, too
    except TypeError:
        pass
    raise InvalidArgumentError(
        f"{call}({argument}={value!r}) on rank {rank}: an integer is expected, not a "
        f"{type(value).__name__}"
    )


def _integers(call: str, argument: str, values: Any, rank: int) -> list[int]:
    if isinstance(values, (str, bytes, dict, torch.Tensor)) or not hasattr(values, "__iter__"):
        raise InvalidArgumentError(
            f"{call}({argument}={values!r}) on rank {rank}: a sequence of integers is expected, "
            f"not a {type(values).__name__}"
        )
    return [_integer(call, argument, value, rank) for value in values]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
