"""PyNcclCommunicator: NCCL through its C interface, without torch.distributed's process group.

It takes every op, dtype and size, across hosts, eager and in CUDA graphs. NCCL adds in an order of
its own choice, so its sums are not bit-identical to ours (`deterministic=False`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from ...base import OPS, Capability, Communicator, Refusal, Splits
from ...bindings.pynccl_wrapper import (
    FP8_DTYPES,
    FP8_SINCE,
    NCCL_REDUCTIONS,
    NcclError,
    NCCLLibrary,
    ncclRedOpTypeEnum,
)
from ...errors import CommunicatorError, InvalidArgumentError, NativeLibraryError, RefusedError
from ...groups.arguments import check_plain
from ...groups.group import Group
from ...settings import Settings
from .checks import NcclHandle, check_handles, check_parts, check_ragged, check_same
from .comm import NcclComm
from .peer_watch import own_process, watchable

_DTYPES = frozenset(
    {
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    }
)
_CLOSE_S = 30.0  # at most, for work in flight when the communicator is closed


class PyNcclCommunicator(Communicator):
    """NCCL over the ranks of a group, one GPU per rank.

    Args:
        group: a torch ProcessGroup (only its store is used, so it may be gloo), a
            StatelessProcessGroup or other Group; None for torch.distributed's default group.
        device: this rank's GPU, e.g. 1, "cuda:1"; default: the current one.
        library_path: path of the NCCL library; default: COMMUNICATORS_NCCL_SO_PATH, else torch's.

    Collective. `run` is what the dispatcher calls; the other methods take the arguments of vLLM's
    PyNcclCommunicator, and of SGLang's but for `all_reduce` (docs/engines.md). Tensors must be
    contiguous and on `device`; operations are enqueued on the current stream, or on `stream`.
    """

    name = "pynccl"
    device_type: ClassVar[str] = "cuda"

    def __init__(
        self,
        group: Group | dist.ProcessGroup | None,
        device: int | str | torch.device | None = None,
        library_path: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.library_path = library_path
        self.nccl: NCCLLibrary | None = None
        self.nccl_version = 0
        self._comm: NcclComm | None = None
        self._enabled = True
        self._stream: Any = None  # what change_state has set
        super().__init__(Group.of(group, settings), self._device(device), settings)

    def _device(self, device: int | str | torch.device | None) -> torch.device:
        if isinstance(device, int):
            device = torch.device(self.device_type, device)
        device = torch.device(self.device_type if device is None else device)
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        return device

    # Opening

    def capability(self) -> Capability | Refusal:
        if self.device.type != self.device_type:
            return Refusal(f"NCCL moves tensors on CUDA devices, and this one is {self.device}")
        try:
            self.nccl = NCCLLibrary(self.library_path or self.settings.nccl_so_path)
            self.nccl_version = self.nccl.ncclGetRawVersion()
        except (NativeLibraryError, NcclError) as error:
            return Refusal(str(error))
        hopper = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device)[0] > 8
        return Capability(
            ops=frozenset(OPS),
            dtypes=_DTYPES | FP8_DTYPES if hopper and self.nccl_version >= FP8_SINCE else _DTYPES,
            modes=frozenset({"eager", "capture"}),
            by=frozenset(NCCL_REDUCTIONS),
            deterministic=False,
        )

    def allocate(self) -> NcclHandle:
        unique_id = bytes(self._nccl.ncclGetUniqueId()) if self.group.rank == 0 else b""
        gpu = ""
        if self.device.type == "cuda":
            gpu = str(torch.cuda.get_device_properties(self.device).uuid)
        return NcclHandle(self.nccl_version, gpu, unique_id, own_process())

    def rendezvous(self, handles: Sequence[NcclHandle]) -> None:
        check_handles(handles)
        # Less than the group's own patience, so that the ranks still agree on the outcome.
        limit = 0.8 * self.settings.timeout_s
        self._comm = NcclComm(
            self._nccl,
            handles[0].unique_id,
            self.group.rank,
            self.group.world_size,
            self.device,
            limit,
        )
        # The first collective makes NCCL connect, which must not happen in a graph's capture.
        ones = torch.ones(1, dtype=torch.float32, device=self.device)
        self.run("all_reduce", ones, ones)
        self._comm.wait(limit)
        self._comm.watch(watchable({rank: one.process for rank, one in enumerate(handles)}))
        if ones.item() != self.group.world_size:
            raise CommunicatorError(
                f"NCCL added {self.group.world_size} ones to {ones.item()} on rank "
                f"{self.group.rank}"
            )

    @property
    def _nccl(self) -> NCCLLibrary:
        assert self.nccl is not None, "capability() comes first"
        return self.nccl

    @property
    def comm(self) -> Any:
        """NCCL's ncclComm_t, or None before it is open and after its end."""
        return None if self._comm is None else self._comm.handle

    @property
    def windows(self) -> dict[int, Any]:
        """Registered address -> window."""
        return {} if self._comm is None else self._comm.windows

    # State

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self.group.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.group.world_size

    @property
    def available(self) -> bool:
        """Whether NCCL opened, on every rank."""
        return self.refusal is None

    @property
    def disabled(self) -> bool:
        """True when it refused at open, failed, was closed, or change_state switched it off."""
        return super().disabled or not self._enabled or self._live_comm is None

    @property
    def _live_comm(self) -> NcclComm | None:
        comm = self._comm
        return comm if comm is not None and comm.handle is not None and not comm.broken else None

    def require_live(self) -> None:
        """RefusedError unless it is live and switched on."""
        super().require_live()
        if self._comm is not None:
            self._comm.require_usable()
        if not self._enabled:
            raise RefusedError(
                f"{self.name} is switched off by change_state on rank {self.group.rank}"
            )

    @contextlib.contextmanager
    def change_state(
        self, enable: bool | None = None, stream: torch.cuda.Stream | None = None
    ) -> Iterator[None]:
        """Within the scope, switches it on (the default) or off, and sets its stream."""
        before = self._enabled, self._stream
        self._enabled = True if enable is None else enable
        self._stream = before[1] if stream is None else stream
        try:
            yield
        finally:
            self._enabled, self._stream = before

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for what was enqueued on the current stream; aborts when it does not end.

        A collective whose peer is gone never ends by itself, and holds up everything behind it.
        Raises CommTimeoutError past `timeout_s` (default: settings.timeout_s) and NcclError when
        NCCL reports a failure; the communicator is aborted and unusable after either.
        """
        self._require("wait").wait(self.settings.timeout_s if timeout_s is None else timeout_s)

    # Operations

    def run(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int = 0,
        by: str = "sum",
        splits: Splits | None = None,
    ) -> None:
        self.require_live()
        tensor = out if inp is None else inp
        assert tensor is not None and self._comm is not None
        if splits is not None and out is not None and inp is not None:
            self._comm.all_to_all(out, inp, splits, self._raw_stream(None))
        elif tensor.numel():
            self._comm.enqueue(op, out, inp, root, self._raw_stream(None), NCCL_REDUCTIONS[by])

    def all_reduce(
        self,
        in_tensor: torch.Tensor,
        out_tensor: torch.Tensor | None = None,
        op: ReduceOp | ReduceOp.RedOpType = ReduceOp.SUM,
        stream: torch.cuda.Stream | None = None,
    ) -> torch.Tensor:
        """Reduces over the ranks into `out_tensor`, or a new tensor without it; returns the result.

        As vLLM's. SGLang's method of this name works in place and is `all_reduce_` here.
        """
        if not isinstance(out_tensor, torch.Tensor | None):
            raise InvalidArgumentError(
                f"all_reduce: out_tensor is {out_tensor}; a tensor or None is accepted, op comes "
                f"third, and all_reduce_(tensor, op, stream) works in place (rank "
                f"{self.group.rank})"
            )
        comm = self._require("all_reduce", in_tensor)
        result = torch.empty_like(in_tensor) if out_tensor is None else out_tensor
        self._require("all_reduce", result)
        check_same("all_reduce", "out_tensor", result, in_tensor)
        self._reduce_into(comm, result, in_tensor, op, stream)
        return result

    def all_reduce_(
        self,
        tensor: torch.Tensor,
        op: ReduceOp | ReduceOp.RedOpType = ReduceOp.SUM,
        stream: torch.cuda.Stream | None = None,
    ) -> torch.Tensor:
        """The same in place; returns `tensor`."""
        self._reduce_into(self._require("all_reduce_", tensor), tensor, tensor, op, stream)
        return tensor

    def _reduce_into(
        self,
        comm: NcclComm,
        out: torch.Tensor,
        inp: torch.Tensor,
        op: ReduceOp | ReduceOp.RedOpType,
        stream: torch.cuda.Stream | None,
    ) -> None:
        reduction = ncclRedOpTypeEnum.from_torch(op)
        comm.enqueue("all_reduce", out, inp, 0, self._raw_stream(stream), reduction)

    def all_gather(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        stream: torch.cuda.Stream | None = None,
        sizes: list[int] | None = None,
    ) -> None:
        """Concatenates the ranks' inputs along dim 0 into `output_tensor`, on every rank.

        Args:
            sizes: rows of each rank's input, when they differ; default: all as this rank's.
        """
        comm = self._require("all_gather", input_tensor, output_tensor)
        raw = self._raw_stream(stream)
        if sizes is None:
            check_parts("all_gather", output_tensor, input_tensor, self.group.world_size)
            comm.enqueue("all_gather", output_tensor, input_tensor, 0, raw)
        else:
            check_ragged("all_gather", sizes, self.group, output_tensor, input_tensor)
            comm.all_gather_ragged(output_tensor.split(sizes), input_tensor, raw)

    def reduce_scatter(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        op: ReduceOp | ReduceOp.RedOpType = ReduceOp.SUM,
        stream: torch.cuda.Stream | None = None,
        sizes: list[int] | None = None,
    ) -> None:
        """Reduces over the ranks; each keeps its part, along dim 0, in `output_tensor`.

        Args:
            sizes: rows of each rank's part, when they differ; default: equal parts.
        """
        comm = self._require("reduce_scatter", input_tensor, output_tensor)
        raw, reduction = self._raw_stream(stream), ncclRedOpTypeEnum.from_torch(op)
        if sizes is None:
            check_parts("reduce_scatter", input_tensor, output_tensor, self.group.world_size)
            comm.enqueue("reduce_scatter", output_tensor, input_tensor, 0, raw, reduction)
        else:
            check_ragged("reduce_scatter", sizes, self.group, input_tensor, output_tensor)
            comm.reduce_scatter_ragged(output_tensor, input_tensor.split(sizes), raw, reduction)

    def send(self, tensor: torch.Tensor, dst: int, stream: torch.cuda.Stream | None = None) -> None:
        """Sends to rank `dst` of the group."""
        comm = self._require("send", tensor)
        comm.enqueue("send", None, tensor, dst, self._raw_stream(stream))

    def recv(self, tensor: torch.Tensor, src: int, stream: torch.cuda.Stream | None = None) -> None:
        """Receives from rank `src` of the group into `tensor`."""
        comm = self._require("recv", tensor)
        comm.enqueue("recv", tensor, None, src, self._raw_stream(stream))

    def broadcast(
        self, tensor: torch.Tensor, src: int, stream: torch.cuda.Stream | None = None
    ) -> None:
        """Rank `src`'s content into `tensor`, on every rank."""
        comm = self._require("broadcast", tensor)
        comm.enqueue("broadcast", tensor, tensor, src, self._raw_stream(stream))

    def group_start(self) -> None:
        """Operations up to `group_end` are started together, so sends and receives may cross."""
        self._require("group_start").nccl.ncclGroupStart()

    def group_end(self) -> None:
        """Starts the operations since `group_start`."""
        comm = self._require("group_end")
        with comm.operation("group_end"):
            comm.nccl.ncclGroupEnd()

    def register_comm_window_raw(self, ptr: int, size: int) -> Any:
        """Registers memory of NCCL's allocator (pynccl_allocator) as a window; collective.

        Every rank registers as many bytes. Registered again, an address keeps its window.
        """
        return self._require("register_comm_window_raw").register(ptr, size)

    def deregister_comm_window(self, window: Any) -> None:
        """Ends a window; the memory stays."""
        self._require("deregister_comm_window").deregister(window)

    # Checks and ends

    def _require(self, call: str, *tensors: torch.Tensor) -> NcclComm:
        """The live NCCL communicator, once the tensors were found fit for it."""
        self.require_live()
        for tensor in tensors:
            check_plain(call, tensor, self.group.rank, "tensor")
            if tensor.device != self.device:
                raise InvalidArgumentError(
                    f"{call}: a tensor is on {tensor.device}; this communicator is bound to "
                    f"{self.device} (rank {self.group.rank})"
                )
            if not tensor.is_contiguous():
                raise InvalidArgumentError(
                    f"{call}: a tensor of shape {tuple(tensor.shape)} has strides "
                    f"{tensor.stride()}; tensors must be contiguous"
                )
        assert self._comm is not None
        return self._comm

    def _raw_stream(self, stream: torch.cuda.Stream | None) -> Any:
        chosen = stream if stream is not None else self._stream
        if chosen is None and self.device.type == "cuda":
            chosen = torch.cuda.current_stream(self.device)
        return None if chosen is None else chosen.cuda_stream

    def abort(self) -> None:
        """Ends what is running, also when peers are gone. It is unusable from then on."""
        if self._comm is not None:
            self._comm.abort("it was aborted")

    def destroy(self) -> None:
        """The same as close()."""
        self.close()

    def release(self) -> None:
        """Waits a bounded time for this rank's work and destroys the communicator, else aborts."""
        if self._comm is not None:
            self._comm.destroy(min(self.settings.timeout_s, _CLOSE_S))
