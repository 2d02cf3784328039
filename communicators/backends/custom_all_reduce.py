"""CustomAllreduce: collectives of 2, 4, 6 or 8 GPUs of one node by kernels that push over NVLink.

Each rank owns a workspace that its peers map (CUDA IPC) and store into; nobody reads a peer's
memory. So an input needs no registration: it is read where it lies, by its own rank, in eager mode
and in CUDA graphs, whatever allocator it came from. Sums are in rank order in fp32, rounded once:
bit-identical on every rank, for every algorithm and size. docs/custom_all_reduce.md describes the
algorithms; native/collectives/workspace.h the protocol.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from ..base import Capability, Communicator, Refusal, Splits, dtype_name
from ..bindings import collectives
from ..bindings.workspace import LAYOUT, SharedBuffer
from ..errors import CommMismatchError, CommunicatorError, InvalidArgumentError, NativeLibraryError
from ..groups.arguments import check_in_place, check_tensor
from ..groups.group import Group
from ..groups.traced import order_tensor
from ..peer_access import p2p
from ..peer_access.topology import Verdict
from ..settings import Settings

WORLD_SIZES = (2, 4, 6, 8)


class CustomAllreduce(Communicator):
    """All-reduce, all-gather and reduce-scatter over NVLink, for the GPUs of one node.

    Args:
        group: a Group, or a torch ProcessGroup that carries host objects (gloo, not NCCL).
        device: this rank's GPU: torch.device, "cuda:1" or an ordinal.
        max_size: bytes of the largest tensor that `should_custom_ar` accepts. None: any.
        settings: by default the group's.
        verdict: what topology allows (p2p.group_verdict); found here when None.

    Raises InvalidArgumentError for an NCCL group or a device that is not a GPU. Everything else
    that keeps it from being used is in `refusal`, the same on all ranks. Collective.
    """

    name: ClassVar[str] = "custom_all_reduce"
    _SUPPORTED_WORLD_SIZES = WORLD_SIZES

    def __init__(
        self,
        group: Group | dist.ProcessGroup | None,
        device: torch.device | str | int,
        max_size: int | None = None,
        *,
        settings: Settings | None = None,
        verdict: Verdict | None = None,
    ) -> None:
        if isinstance(group, dist.ProcessGroup) and dist.get_backend(group) == dist.Backend.NCCL:
            raise InvalidArgumentError(
                "CustomAllreduce(group): the group exchanges handles between host processes, so a "
                "gloo group is expected, not an NCCL group"
            )
        device = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        if device.type != "cuda" or device.index is None:
            raise InvalidArgumentError(
                f"CustomAllreduce(device={device}): a GPU with its ordinal is expected (cuda:0)"
            )
        self.max_size = max_size
        self._library: collectives.Collectives | None = None
        self._buffer: SharedBuffer | None = None
        self._handle = 0
        self._index = device.index
        self._call: collectives.AllReduceCall | None = None
        # `_call`, where calls are not compared.
        self._fast: collectives.AllReduceCall | None = None
        ranks = Group.of(group)
        if verdict is None and ranks.world_size in WORLD_SIZES:
            verdict = p2p.group_verdict(ranks, device)
        self._verdict = verdict
        super().__init__(ranks, device, settings)

    # The verbs of Communicator.

    def capability(self) -> Capability | Refusal:
        world_size = self.group.world_size
        if world_size not in WORLD_SIZES:
            return Refusal(f"world size {world_size} is not one of 2, 4, 6, 8")
        if not torch.cuda.is_available():
            return Refusal("this process has no CUDA device")
        try:
            self._library = collectives.load()
        except NativeLibraryError as error:
            return Refusal(str(error))
        if self._verdict is not None and self._verdict.refusal is not None:
            return self._verdict.refusal
        return Capability(
            ops=frozenset({"all_reduce", "all_gather", "reduce_scatter"}),
            dtypes=frozenset(collectives.DTYPES),
            modes=frozenset({"eager", "capture"}),
            max_bytes=self.max_size,
        )

    def allocate(self) -> Any:
        assert self._library is not None
        nbytes = self._library.custom_ar_bytes(*LAYOUT)
        self._buffer = SharedBuffer.allocate(nbytes, self.device, self.group.rank)
        return self._buffer.handle, LAYOUT

    def rendezvous(self, handles: Sequence[Any]) -> None:
        assert self._buffer is not None and self._library is not None
        for rank, (_, layout) in enumerate(handles):
            if layout != LAYOUT:
                raise CommMismatchError(
                    f"rank {self.group.rank} has workspaces of {LAYOUT}, and rank {rank} of "
                    f"{layout} bytes"
                )
        self._buffer.map_peers([handle for handle, _ in handles])
        with torch.cuda.device(self.device):
            self._handle = self._library.create_custom_ar(
                self._buffer.pointers, self.group.rank, LAYOUT
            )
        self._order = order_tensor(self.device)
        self.set_timeout(self.settings.timeout_s)
        self._call = self._library.all_reduce_call(self._handle, torch.empty(1, device=self.device))
        self._fast = None if self.settings.debug else self._call

    def run(
        self,
        op: str,
        out: torch.Tensor | None,
        inp: torch.Tensor | None,
        root: int = 0,
        by: str = "sum",
        splits: Splits | None = None,
    ) -> None:
        if not self._handle:
            self.require_live()
        assert out is not None and inp is not None
        if op == "all_reduce" and self._launched(inp, out):
            return
        self._check_tensors(op, inp, out)
        if op == "all_reduce":
            self._all_reduce(inp, out)
        elif op == "all_gather":
            self._all_gather(inp, out)
        elif op == "reduce_scatter":
            self._reduce_scatter(inp, out)
        else:
            raise InvalidArgumentError(f"{self.name} has no {op}")

    def release(self) -> None:
        library, handle, buffer = self._library, self._handle, self._buffer
        self._handle, self._buffer, self._fast = 0, None, None
        if handle:
            assert library is not None
            library.end(handle, self.device, buffer.close if buffer is not None else None)
        elif buffer is not None:
            buffer.close()

    def _launched(self, inp: torch.Tensor, out: torch.Tensor) -> bool:
        """The fast path. False, with nothing done, unless both tensors are contiguous, on this GPU,
        of one size and of one dtype that is summed."""
        if self._fast is None or torch.compiler.is_compiling():
            return False
        status = self._fast(inp, out)
        if status > 0:
            self._library.fail()  # type: ignore[union-attr]
        return status == 0

    # The collectives, on checked tensors.

    def _all_reduce(self, inp: torch.Tensor, out: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.communicators.custom_ar_all_reduce(self._handle, inp, out, self._order)
            return
        if self.settings.debug:
            self._compare("all_reduce", inp)
        assert self._call is not None and self._library is not None
        self._library.check(self._call(inp, out))

    def _all_gather(self, inp: torch.Tensor, out: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.communicators.custom_ar_all_gather(
                self._handle, inp, out, self.group.world_size, self._order
            )
            return
        if self.settings.debug:
            self._compare("all_gather", inp)
        assert self._library is not None
        stream = collectives.current_stream(self._index)
        self._library.check(
            self._library.custom_ar_all_gather(
                self._handle, inp.data_ptr(), out.data_ptr(), inp.nbytes, stream
            )
        )

    def _reduce_scatter(self, inp: torch.Tensor, out: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.communicators.custom_ar_reduce_scatter(
                self._handle, inp, out, self.group.world_size, self._order
            )
            return
        if self.settings.debug:
            self._compare("reduce_scatter", inp)
        assert self._library is not None
        code = collectives.DTYPES[inp.dtype]
        stream = collectives.current_stream(self._index)
        self._library.check(
            self._library.custom_ar_reduce_scatter(
                self._handle, code, inp.data_ptr(), out.data_ptr(), out.nbytes, stream
            )
        )

    def _tensor(self, op: str, inp: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """check_tensor, and check_in_place of `out`; a tracer's tensor has no memory to look at."""
        if torch.compiler.is_compiling():
            return inp
        if out is not None:
            check_in_place(op, out, self.group.rank, "out")
        return check_tensor(op, inp, self.group.rank)

    def _check_tensors(self, op: str, inp: torch.Tensor, out: torch.Tensor) -> None:
        if inp.get_device() != self._index or out.get_device() != self._index:
            raise InvalidArgumentError(
                f"{op}(x): x is on {inp.device} and the output on {out.device}; this communicator "
                f"of rank {self.group.rank} is bound to {self.device}"
            )
        if inp.dtype is not out.dtype:
            raise InvalidArgumentError(f"{op}(x): x is {inp.dtype} and the output {out.dtype}")
        if inp.dtype not in collectives.DTYPES and op != "all_gather":
            names = ", ".join(sorted(dtype_name(dtype) for dtype in collectives.DTYPES))
            raise InvalidArgumentError(f"{op}(x): x is {dtype_name(inp.dtype)}; it sums {names}")
        if not (inp.is_contiguous() and out.is_contiguous()):
            raise InvalidArgumentError(f"{op}(x): x and the output must be contiguous")
        parts_in = self.group.world_size if op == "all_gather" else 1
        parts_out = self.group.world_size if op == "reduce_scatter" else 1
        if inp.numel() * parts_in != out.numel() * parts_out:
            raise InvalidArgumentError(
                f"{op}(x): x has {inp.numel()} elements and the output {out.numel()}, in a group "
                f"of {self.group.world_size}"
            )

    def _compare(self, op: str, inp: torch.Tensor) -> None:
        """COMMUNICATORS_DEBUG: compares a call across the ranks, where it is not captured."""
        if torch.cuda.is_current_stream_capturing():
            return
        mine = (op, dtype_name(inp.dtype), inp.numel())
        for rank, theirs in enumerate(self.group.gather_objects(f"{self.name}.call", mine)):
            if theirs != mine:
                raise CommMismatchError(
                    f"rank {self.group.rank} calls {mine[0]} of {mine[2]} elements of {mine[1]}, "
                    f"and rank {rank} {theirs[0]} of {theirs[2]} elements of {theirs[1]}"
                )

    # What a user of CustomAllreduce in vLLM or SGLang calls.

    def should_custom_ar(self, inp: torch.Tensor) -> bool:
        """Whether `all_reduce(inp)` would run: live, a dtype that it sums, not above max_size.

        Only facts that are equal on all ranks; a tensor that is not contiguous is staged.
        """
        if self.disabled or inp.dtype not in collectives.DTYPES or inp.device != self.device:
            return False
        return self.max_size is None or inp.nbytes <= self.max_size

    def all_reduce(
        self, inp: torch.Tensor, *, out: torch.Tensor | None = None, registered: bool = False
    ) -> torch.Tensor:
        """The sum over the ranks, of inp's shape and dtype, in `out` (new when None; may be inp).

        `registered` is accepted and changes nothing: inputs are always read where they lie.
        """
        tracing = torch.compiler.is_compiling()
        if not tracing and type(inp) is torch.Tensor and not inp.is_neg():
            target = torch.empty_like(inp) if out is None else out
            if (out is None or not out.is_neg()) and self._launched(inp, target):
                return target
        return self._all_reduce_checked(inp, out)

    def _all_reduce_checked(
        self, inp: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not self._handle:
            self.require_live()
        source = self._tensor("all_reduce", inp, out).contiguous()
        target = torch.empty_like(source) if out is None else out
        negated = not torch.compiler.is_compiling() and target.is_neg()
        if negated or not target.is_contiguous():
            staged = torch.empty_like(target, memory_format=torch.contiguous_format)
            self._all_reduce_checked(source, staged)
            return target.copy_(staged)
        self._check_tensors("all_reduce", source, target)
        self._all_reduce(source, target)
        return target

    def all_reduce_reg(self, inp: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """all_reduce; kept for callers that tell registered inputs apart."""
        return self.all_reduce(inp, out=out)

    def all_reduce_unreg(self, inp: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """all_reduce; kept for callers that tell registered inputs apart."""
        return self.all_reduce(inp, out=out)

    def custom_all_reduce(self, input: torch.Tensor) -> torch.Tensor | None:
        """all_reduce(input), or None where should_custom_ar(input) is False."""
        return self.all_reduce(input) if self.should_custom_ar(input) else None

    def all_gather(self, inp: torch.Tensor) -> torch.Tensor:
        """[W * n, ...]: the tensors of all ranks one after the other along dim 0; any dtype."""
        self.require_live()
        source = self._tensor("all_gather", inp).contiguous()
        shape = (self.group.world_size * source.shape[0], *source.shape[1:])
        out = torch.empty(shape, dtype=source.dtype, device=source.device)
        self.run("all_gather", out, source)
        return out

    def reduce_scatter(self, inp: torch.Tensor) -> torch.Tensor:
        """Part `rank`, along dim 0, of the sum; dim 0 must be a multiple of the world size."""
        self.require_live()
        world_size = self.group.world_size
        inp = self._tensor("reduce_scatter", inp)
        if inp.dim() == 0 or inp.shape[0] % world_size:
            raise InvalidArgumentError(
                f"reduce_scatter(x): x {list(inp.shape)} must have a dim 0 that is a multiple of "
                f"{world_size}"
            )
        source = inp.contiguous()
        shape = (source.shape[0] // world_size, *source.shape[1:])
        out = torch.empty(shape, dtype=source.dtype, device=source.device)
        self.run("reduce_scatter", out, source)
        return out

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """A scope around the capture of CUDA graphs.

        At its end, if the capture succeeded, the ranks compare the calls that graphs have recorded,
        here or anywhere since the last time: CommMismatchError unless they are the same, since
        replays would wait for calls that never come.
        """
        try:
            yield
        except BaseException:
            if self._handle:  # what a capture that failed has recorded is compared with nobody
                assert self._library is not None
                self._library.captured(self._handle)
            raise
        if not self.disabled:
            self.register_graph_buffers()

    def register_graph_buffers(self) -> None:
        """Compares the captured calls across ranks. There is nothing to register."""
        self.require_live()
        assert self._library is not None
        mine = self._library.captured(self._handle)
        found = self.group.gather_objects(f"{self.name}.captured", mine)
        if len(set(found)) > 1:
            listed = ", ".join(f"rank {rank}: {count}" for rank, (count, _) in enumerate(found))
            differ = "numbers of calls" if len({count for count, _ in found}) > 1 else "calls"
            raise CommMismatchError(
                f"{self.name}: the ranks captured different {differ} ({listed}); replaying these "
                "graphs would wait for calls that never come"
            )

    def register_buffer(self, inp: torch.Tensor) -> None:
        """Accepts `inp` without doing anything: every rank reads its own inputs where they lie."""
        if inp.get_device() != self._index:
            raise InvalidArgumentError(
                f"register_buffer(x): x is on {inp.device}; this communicator is bound to "
                f"{self.device}"
            )

    @staticmethod
    def create_shared_buffer(
        size_in_bytes: int, group: Group | dist.ProcessGroup | None = None
    ) -> list[int]:
        """Addresses of one new buffer per rank, mapped into this process; on the current device.

        Collective. Free it with `free_shared_buffer`.
        """
        ranks = Group.of(group)
        device = torch.device("cuda", torch.cuda.current_device())
        buffer = SharedBuffer.allocate(size_in_bytes, device, ranks.rank)
        try:
            buffer.map_peers(ranks.gather_objects("create_shared_buffer", buffer.handle))
        except CommunicatorError:
            buffer.close()
            raise
        return buffer.pointers

    @staticmethod
    def free_shared_buffer(
        pointers: Sequence[int],
        group: Group | dist.ProcessGroup | None = None,
        rank: int | None = None,
    ) -> None:
        """Unmaps and frees what `create_shared_buffer` returned; if a disposed handle lay over it,
        not before the CUDA graphs are gone that recorded its calls. Local."""
        own = Group.of(group).rank if rank is None else rank
        device = torch.device("cuda", torch.cuda.current_device())
        buffer = SharedBuffer(0, device, own, b"", pointers[own], list(pointers))
        collectives.load().free(pointers, buffer.close)

    # Faults and tuning.

    def check(self) -> None:
        """Raises what the device has reported: CommTimeoutError for a late peer, CommunicatorError
        for two calls in flight at once. Every call checks first; this is for after the last one."""
        if self._handle:
            assert self._library is not None
            self._library.gpu_check(self._handle)

    def synchronize(self) -> None:
        """Waits for the device and then checks."""
        torch.cuda.synchronize(self.device)
        self.check()

    def set_timeout(self, seconds: float) -> None:
        """The deadline of every wait on the device; by default COMMUNICATORS_TIMEOUT_S."""
        assert self._library is not None
        self._library.gpu_set_timeout_ns(self._handle, int(seconds * 1e9))

    def tune(self, name: str, value: int) -> None:
        """Overrides one choice (native/collectives/custom_all_reduce.h); the same on all ranks."""
        assert self._library is not None
        self._library.tune(self._handle, name, value)

    def algorithm(self, nbytes: int) -> str:
        """Which algorithm an all-reduce of `nbytes` uses."""
        assert self._library is not None
        return self._library.algorithm(self._handle, nbytes)

    def __del__(self) -> None:
        # Never communicates. At interpreter exit the driver takes everything back by itself.
        if getattr(self, "_handle", 0) and torch.cuda.is_initialized():
            self.close()
