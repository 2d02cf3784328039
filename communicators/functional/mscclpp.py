"""sglang's functional interface to MSCCL++: unique id, context, all-reduce, by integer handle.

The signatures are those of sgl_kernel.allreduce. They stand on the same `mscclpp` package as
PyMscclppCommunicator.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..backends.mscclpp.context import (
    DTYPES,
    UNIQUE_ID_BYTES,
    MscclppContext,
    load_package,
    new_unique_id,
)
from ..base import Refusal
from ..errors import InvalidArgumentError, RefusedError
from ..settings import Settings

#: sgl_kernel's values of context_selection; both run within one node.
_ONE_NODE = {1: ("allpair_packet", "packet", "rsag"), 2: ("packet", "allpair_packet", "rsag")}
_contexts: dict[int, tuple[MscclppContext, int, torch.Tensor]] = {}  # what the integers mean
_handles = itertools.count(1)


def _package() -> Any:
    package = load_package()
    if isinstance(package, Refusal):
        raise RefusedError(f"mscclpp: {package}")
    return package


def mscclpp_generate_unique_id() -> torch.Tensor:
    """128 bytes (uint8, CPU) by which the ranks of a context find each other; made on one rank."""
    return torch.frombuffer(bytearray(new_unique_id(_package())), dtype=torch.uint8)


def mscclpp_init_context(
    unique_id: torch.Tensor,
    rank: int,
    world_size: int,
    scratch: torch.Tensor,
    put_buffer: torch.Tensor,
    nranks_per_node: int,
    rank_to_node: list[int],
    rank_to_ib: list[int],
    context_selection: int,
) -> int:
    """Connects the ranks over `scratch`; a handle for mscclpp_allreduce. Collective.

    Args:
        unique_id: from mscclpp_generate_unique_id on one rank, sent to all.
        scratch: device memory for the messages in flight, at least 12 times the largest message;
            it is zeroed, since packets are known by a count that starts anew.
        put_buffer, rank_to_ib: for all-reduce between nodes, which is not offered here; ignored.
        nranks_per_node, rank_to_node: must say that all ranks are on one node.
        context_selection: 1 prefers the one-shot algorithm, 2 the two-shot one.
    """
    where = f"mscclpp_init_context on rank {rank}"
    if unique_id.dtype != torch.uint8 or unique_id.numel() != UNIQUE_ID_BYTES:
        raise InvalidArgumentError(
            f"{where}: unique_id must be {UNIQUE_ID_BYTES} bytes of uint8, it is "
            f"{list(unique_id.shape)} of {unique_id.dtype}"
        )
    if nranks_per_node != world_size or len(set(rank_to_node)) > 1:
        raise RefusedError(
            f"{where}: {nranks_per_node} of {world_size} ranks a node (nodes {rank_to_node}); only "
            "contexts within one node are offered"
        )
    if context_selection not in _ONE_NODE:
        raise InvalidArgumentError(
            f"{where}: context_selection={context_selection} is not one of {sorted(_ONE_NODE)}"
        )
    scratch.zero_()  # done before any peer can write: MscclppContext waits for the device
    context = MscclppContext(
        _package(),
        bytes(unique_id.cpu().numpy().tobytes()),
        rank,
        world_size,
        scratch.data_ptr(),
        scratch.nbytes,
        scratch.device,
        Settings.from_environment().timeout_s,
    )
    handle = next(_handles)
    _contexts[handle] = (context, context_selection, scratch)  # the scratch lives as long
    return handle


def mscclpp_allreduce(
    context: int, inp: torch.Tensor, out: torch.Tensor, nthreads: int, nblocks: int
) -> None:
    """The sum of every rank's `inp` in `out`, on the current stream.

    Args:
        inp, out: contiguous, of one shape and dtype (fp16, bf16, fp32), at 16-byte addresses.
        nthreads, nblocks: the launch; 0 leaves it to the package.
    """
    if context not in _contexts:
        raise InvalidArgumentError(f"mscclpp_allreduce: {context} is no open context")
    opened, selection, _ = _contexts[context]
    if inp.dtype not in DTYPES or out.dtype != inp.dtype or out.nbytes != inp.nbytes:
        raise InvalidArgumentError(
            f"mscclpp_allreduce on rank {opened.rank}: inp {list(inp.shape)} of {inp.dtype} and "
            f"out {list(out.shape)} of {out.dtype} must be alike, in fp16, bf16 or fp32"
        )
    reasons = []
    for name in _ONE_NODE[selection]:
        reason = opened.why_not(name, inp.nbytes)
        if reason is None:
            return opened.execute(name, inp, out, nblocks, nthreads)
        reasons.append(f"{name}: {reason}")
    raise InvalidArgumentError(
        f"mscclpp_allreduce on rank {opened.rank}: no algorithm takes it ({'; '.join(reasons)})"
    )
