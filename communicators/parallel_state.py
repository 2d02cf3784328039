"""The groups of a torchrun job: world, tensor-, pipeline- and data-parallel.

    init_distributed_environment()
    initialize_model_parallel(tensor_model_parallel_size=2)
    y = get_tp_group().all_reduce(x)
    destroy_distributed_environment()

The open groups are kept in open_groups.OPEN_GROUPS, and nowhere else.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from .backends.quick.codecs import bits_of
from .errors import TopologyError
from .groups import inherited
from .groups.coordinator import GroupCoordinator
from .groups.group import Group
from .groups.open_groups import OPEN_GROUPS, open_group
from .groups.rendezvous import checked_integer, integer_of_environment, meet
from .settings import Settings


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str = "env://",
    local_rank: int = -1,
    backend: str | None = None,
    device: torch.device | str | None = None,
) -> GroupCoordinator:
    """Brings the ranks together and opens the world group. Collective over all ranks.

    Args:
        world_size, rank: -1: from the launcher's environment (WORLD_SIZE, RANK).
        distributed_init_method: "env://", "tcp://host:port" or "file:///path".
        local_rank: rank on this host, which picks the device; -1: LOCAL_RANK, else the rank.
        backend: torch.distributed backend of the default process group; default: gloo. The groups
            of this library bring their own.
        device: default: cuda:local_rank where torch has CUDA and a GPU is there, else cpu.
    Raises:
        TopologyError: world size or rank contradict the environment, or no such GPU.
            An environment variable that is no such number is named.
        InvalidArgumentError: nobody can meet at distributed_init_method: a port in use, a wrong
            address, no such directory.
        CommTimeoutError: not all ranks arrived within COMMUNICATORS_TIMEOUT_S; it names them.
        PeerDiedError: one arrived and ended before all were there.
    """
    if "world" in OPEN_GROUPS:
        return OPEN_GROUPS["world"]
    settings = Settings.from_environment()
    world_size = _from_environment("world_size", world_size, "WORLD_SIZE", 1)
    rank = _from_environment("rank", rank, "RANK", 0)
    if not 0 <= rank < world_size:
        raise TopologyError(f"rank {rank} is not in 0..{world_size - 1} (world size {world_size})")
    if local_rank < 0:
        known = "LOCAL_RANK" in os.environ
        local_rank = integer_of_environment("LOCAL_RANK", 0) if known else rank
    where = torch.device(device) if device is not None else _local_device(local_rank)
    inherited.forget_torch_groups()
    if not dist.is_initialized():
        store = meet(distributed_init_method, rank, world_size, settings.timeout_s)
        # Before the process group's own rendezvous, whose time-out does not say who is missing.
        world = Group(store, rank, world_size, name="world-init", settings=settings)
        world.barrier()
        timeout = datetime.timedelta(seconds=settings.timeout_s)
        world.attend(
            lambda: dist.init_process_group(
                backend or "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
            ),
            "init_process_group",
            on_thread=(backend or "gloo") == "gloo",
        )
    if dist.get_world_size() != world_size or dist.get_rank() != rank:
        raise TopologyError(
            f"torch.distributed was initialised as rank {dist.get_rank()} of "
            f"{dist.get_world_size()}, and rank {rank} of {world_size} was asked for"
        )
    if where.type == "cuda":
        torch.cuda.set_device(where)
    return GroupCoordinator(range(world_size), where, "world", settings)


def _from_environment(argument: str, given: int, variable: str, least: int) -> int:
    known = variable in os.environ
    if given == -1:
        if not known:
            raise TopologyError(
                f"{argument} was not given and {variable} is not set; start the job with torchrun "
                "or pass it"
            )
        return integer_of_environment(variable, least)
    given = checked_integer(argument, given, least)
    if known and integer_of_environment(variable, least) != given:
        raise TopologyError(
            f"{argument}={given} contradicts {variable}={os.environ[variable]} of the environment"
        )
    return given


def _local_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise TopologyError(
            f"local rank {local_rank} has no GPU: this process sees {count}; start at most "
            f"{count} ranks a host or pass device="
        )
    return torch.device("cuda", local_rank)


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    *,
    group_ranks: dict[str, Sequence[Sequence[int]]] | None = None,
    all_reduce_codec: str | None = None,
) -> None:
    """Opens the groups of a job, after init_distributed_environment. Collective over all ranks.

    Ranks are laid out with tensor parallelism innermost, then pipeline, then data parallelism for
    what is left of the world: rank = (dp * PP + pp) * TP + tp.

    Args:
        group_ranks: further groups, or others in place of "tp", "pp" and "dp": for each name the
            lists of global ranks. Lists may differ in length; a rank may be in no list of a name.
        all_reduce_codec: allows the group "tp" to round in large all-reduces: "Q8", "Q6" or "Q4"
            (QuickAllReduce); "" does not. Default: COMMUNICATORS_QUICK_CODEC, for every group.
    Raises:
        TopologyError: the sizes do not divide the world, or a list names a rank twice.
        InvalidArgumentError: an unknown codec.
    """
    world = get_world_group()
    tp, pp = tensor_model_parallel_size, pipeline_model_parallel_size
    layouts = _layouts(world.world_size, tp, pp) if tp > 0 and pp > 0 else None
    overridden = set(group_ranks or {})
    if layouts is None or (world.world_size % (tp * pp) and not {"tp", "pp", "dp"} <= overridden):
        raise TopologyError(
            f"a world of {world.world_size} ranks cannot be split into tensor parallel size {tp} "
            f"x pipeline parallel size {pp}; their product must divide it"
        )
    layouts.update(group_ranks or {})
    settings = world.settings
    if all_reduce_codec is not None:
        if all_reduce_codec:
            bits_of(all_reduce_codec)
        settings = replace(settings, quick_codec=all_reduce_codec)
    for name, lists in layouts.items():
        _open_group(name, lists, settings if name == "tp" else world.settings)


def _layouts(world_size: int, tp: int, pp: int) -> dict[str, Sequence[Sequence[int]]]:
    ranks = torch.arange(world_size // (tp * pp) * tp * pp).reshape(-1, pp, tp)
    return {
        "tp": ranks.reshape(-1, tp).tolist(),
        "pp": ranks.transpose(1, 2).reshape(-1, pp).tolist(),
        "dp": ranks.permute(1, 2, 0).reshape(tp * pp, -1).tolist(),
    }


def _open_group(name: str, lists: Sequence[Sequence[int]], settings: Settings) -> None:
    world = get_world_group()
    flat = [rank for ranks in lists for rank in ranks]
    if len(set(flat)) != len(flat) or not set(flat) <= set(range(world.world_size)):
        raise TopologyError(
            f"group {name!r}: {[list(ranks) for ranks in lists]} must name each rank of "
            f"0..{world.world_size - 1} at most once"
        )
    for ranks in lists:
        if world.rank in ranks:
            GroupCoordinator(ranks, world.device, name, settings)


def get_group(name: str) -> GroupCoordinator:
    """The open group `name` that this rank is in; CommunicatorError when there is none."""
    return open_group(name)


def get_world_group() -> GroupCoordinator:
    """The group of all ranks."""
    return get_group("world")


def get_tp_group() -> GroupCoordinator:
    """This rank's tensor-parallel group."""
    return get_group("tp")


def get_pp_group() -> GroupCoordinator:
    """This rank's pipeline-parallel group."""
    return get_group("pp")


def get_dp_group() -> GroupCoordinator:
    """This rank's data-parallel group."""
    return get_group("dp")


def model_parallel_is_initialized() -> bool:
    """True when the tensor- and pipeline-parallel groups are open."""
    return "tp" in OPEN_GROUPS and "pp" in OPEN_GROUPS


def get_tensor_model_parallel_world_size() -> int:
    return get_tp_group().world_size


def get_tensor_model_parallel_rank() -> int:
    return get_tp_group().rank_in_group


@dataclass
class GraphCaptureContext:
    """What graph_capture yields: the stream to capture on (None on a CPU)."""

    stream: torch.cuda.Stream | None


@contextlib.contextmanager
def graph_capture(stream: torch.cuda.Stream | None = None) -> Iterator[GraphCaptureContext]:
    """A scope in which CUDA graphs with collectives of any open group are captured.

    At its end the ranks of each group compare what they captured: CommMismatchError unless they
    recorded the same calls. Collective over the ranks of every open group.

    Args:
        stream: the stream to capture on; default: a new one that waits for the current one.
    """
    device = get_world_group().device
    with contextlib.ExitStack() as stack:
        for group in OPEN_GROUPS.values():
            stack.enter_context(group.capture())
        if device.type == "cuda":
            stream = stream or torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            stack.enter_context(torch.cuda.stream(stream))
        yield GraphCaptureContext(stream)


def tensor_model_parallel_all_reduce(x: torch.Tensor) -> torch.Tensor:
    """all_reduce over the tensor-parallel group; a new tensor."""
    return get_tp_group().all_reduce(x)


def tensor_model_parallel_all_gather(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """all_gather over the tensor-parallel group."""
    return get_tp_group().all_gather(x, dim)


def tensor_model_parallel_gather(
    x: torch.Tensor, dst: int = 0, dim: int = -1
) -> torch.Tensor | None:
    """gather over the tensor-parallel group."""
    return get_tp_group().gather(x, dst, dim)


def tensor_model_parallel_reduce_scatter(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """reduce_scatter over the tensor-parallel group."""
    return get_tp_group().reduce_scatter(x, dim)


def destroy_model_parallel() -> None:
    """Closes every group but the world's, communicators before their process groups."""
    for name in [name for name in OPEN_GROUPS if name != "world"]:
        OPEN_GROUPS[name].close()


def destroy_distributed_environment() -> None:
    """Closes all groups and torch.distributed. Idempotent."""
    destroy_model_parallel()
    if "world" in OPEN_GROUPS:
        OPEN_GROUPS["world"].close()
    if dist.is_initialized() and not inherited.torch_groups:
        dist.destroy_process_group()


__all__ = [
    "GraphCaptureContext",
    "destroy_distributed_environment",
    "destroy_model_parallel",
    "get_dp_group",
    "get_group",
    "get_pp_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "get_tp_group",
    "get_world_group",
    "graph_capture",
    "init_distributed_environment",
    "initialize_model_parallel",
    "model_parallel_is_initialized",
    "tensor_model_parallel_all_gather",
    "tensor_model_parallel_all_reduce",
    "tensor_model_parallel_gather",
    "tensor_model_parallel_reduce_scatter",
]
