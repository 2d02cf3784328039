"""PyMscclppCommunicator: all-reduce and all-gather of Microsoft's `mscclpp` Python package.

The package is not on a registry: it is built from its repository (see docs/mscclpp.md). Its sums
are in an order of its own, different on each rank, and in the tensor's dtype, so `deterministic`
is false. Algorithms that use NVLink multicast ("nvls") are never candidates.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ...base import Capability, Communicator, Refusal, Splits, dtype_name
from ...errors import CommunicatorError, InvalidArgumentError, RefusedError
from ...groups.arguments import check_tensor
from ...groups.group import Group
from ...settings import Settings
from .context import ALGORITHMS, DTYPES, MscclppContext, load_package, new_unique_id

ReduceOp = dist.ReduceOp | dist.ReduceOp.RedOpType
_CANDIDATES = ("allpair_packet", "packet", "rsag")
_SMALLEST = 1 << 10
_SCRATCH_FACTOR = 12  # packet needs 12 times its message, the most of all
_TEST_NITER, _WARMUP_NITER = 10, 2

#: Contexts and their scratch memory whose calls CUDA graphs recorded. The package does not say when
#: those are gone, so they stay as long as the process.
_kept: list[tuple[MscclppContext, Any]] = []


def mscclpp_is_weak_contiguous(inp: torch.Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of dimensions."""
    beyond = inp.untyped_storage().nbytes() - inp.storage_offset() * inp.element_size()
    return inp.is_contiguous() or beyond == inp.nbytes


def mscclpp_convert_to_bytes(size_str: str | int) -> int:
    """'1MB', '2.5kb', '3 GB' or '64' as a number of bytes; units are powers of 1024.

    Raises InvalidArgumentError for another unit, a negative number or a fraction of a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", str(size_str).lower())
    number = float(match[1]) * 1024 ** " kmgt".index(match[2] or " ") if match else 0.5
    if number != int(number):
        raise InvalidArgumentError(
            f"mscclpp_convert_to_bytes({size_str!r}): a whole number of bytes is expected, like "
            "'1MB', '2.5kb', '3 GB' or '64'"
        )
    return int(number)


def mscclpp_bench_time(
    func: Callable[[], Any], test_niter: int = _TEST_NITER, warmup_niter: int = _WARMUP_NITER
) -> float:
    """Microseconds a call of `func`, which launches on the current stream.

    On a GPU `test_niter` calls are captured in a CUDA graph and one replay is timed; elsewhere the
    calls are timed one after the other.
    """
    for _ in range(warmup_niter):
        func()
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for _ in range(test_niter):
            func()
        return (time.perf_counter() - started) / test_niter * 1e6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(test_niter):
            func()
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / test_niter * 1e3


class PyMscclppCommunicator(Communicator):
    """all_reduce (fp16, bf16, fp32 sums) and all_gather on one host, over the mscclpp package.

    Args:
        group: the ranks; a torch ProcessGroup that is not NCCL's (None: the default one) or a
            Group. Construction is collective and tunes: which algorithm and launch for which size.
        device: this rank's GPU; an index, a string or a torch.device. Default: the current one.
        max_bytes: largest message; 12 times as much scratch memory is taken.
    """

    name = "mscclpp"

    def __init__(
        self,
        group: Group | dist.ProcessGroup | None,
        device: torch.device | int | str | None = None,
        max_bytes: int | str = "1MB",
        settings: Settings | None = None,
    ) -> None:
        self.max_bytes = mscclpp_convert_to_bytes(max_bytes)
        self.context: MscclppContext | None = None
        #: dtype -> message sizes in ascending order, each with its algorithm, blocks and threads.
        self.tuned: dict[torch.dtype, list[tuple[int, tuple[str, int, int]]]] = {}
        self._enabled = True
        self._package: Any = None
        self._scratch: Any = None
        where = torch.device("cuda", device) if isinstance(device, int) else device
        super().__init__(Group.of(group, settings), torch.device(where or "cuda"), settings)
        if self.refusal is None and not self.pre_tune_config(torch.bfloat16):
            self.refusal = Refusal("no algorithm of the package ran on all ranks at any size")
            self.capabilities = None
            self.release()

    def platform(self) -> Refusal | None:
        """Why this process's device will not do, or None. Local."""
        if self.device.type != "cuda" or not torch.cuda.is_available():
            return Refusal(f"it works on CUDA devices; this rank is on {self.device}")
        return None

    def capability(self) -> Capability | Refusal:
        if not 2 <= self.group.world_size <= 8:
            return Refusal(f"world size {self.group.world_size} is not one of 2 to 8")
        package = load_package()
        if isinstance(package, Refusal):
            return package
        self._package = package
        lacking = self.platform()
        if lacking is not None:
            return lacking
        return Capability(
            frozenset({"all_reduce", "all_gather"}),
            frozenset(DTYPES),
            modes=frozenset({"eager", "capture"}),
            max_bytes=self.max_bytes,
            multiple=16,
            deterministic=False,
        )

    def allocate(self) -> bytes | None:
        scratch_bytes = max(_SCRATCH_FACTOR, self.group.world_size) * self.max_bytes
        self._scratch = self._package.RawGpuBuffer(scratch_bytes)
        return new_unique_id(self._package) if self.group.rank == 0 else None

    def rendezvous(self, handles: Sequence[bytes | None]) -> None:
        identity = handles[0]
        assert identity is not None
        self.context = MscclppContext(
            self._package,
            identity,
            self.group.rank,
            self.group.world_size,
            self._scratch.data(),
            self._scratch.bytes(),
            self.device,
            self.settings.timeout_s,
        )

    def release(self) -> None:
        if self.context is not None and self.context.captured:
            _kept.append((self.context, self._scratch))
        elif self.context is not None:
            self.context.close()
        self.context = self._scratch = None

    # -- tuning -------------------------------------------------------------------------------

    def pre_tune_config(self, dtype: torch.dtype = torch.bfloat16) -> bool:
        """Measures algorithms and launches for sums of `dtype` at each power of two. Collective.

        The ranks vote: a configuration that failed, or gave a wrong sum, on any rank is out. The
        time of a configuration is the largest of all ranks'. Returns whether anything is left;
        until then sums of `dtype` go by what was measured for another one.
        """
        self.require_live()
        found: list[tuple[int, tuple[str, int, int]]] = []
        nbytes = min(_SMALLEST, self.max_bytes)
        while nbytes <= self.max_bytes:
            best = self._tune_size(dtype, nbytes)
            if best is not None:
                found.append((nbytes, best))
            nbytes *= 2
        if found:
            self.tuned[dtype] = found
        return bool(found)

    def _tune_size(self, dtype: torch.dtype, nbytes: int) -> tuple[str, int, int] | None:
        assert self.context is not None
        world_size = self.group.world_size
        inp = torch.full((nbytes // dtype.itemsize,), self.group.rank + 1.0, device=self.device)
        inp = inp.to(dtype)
        total = world_size * (world_size + 1) // 2  # small: exact in every dtype
        results: list[tuple[float, tuple[str, int, int]]] = []
        for name in _CANDIDATES:
            if self.context.why_not(name, nbytes) is not None:
                continue
            for blocks, threads in ALGORITHMS[name].launches(world_size):
                config = (name, blocks, threads)
                tag = f"{config} at {nbytes}"
                # Two votes: a rank whose first call failed must not leave the others waiting in
                # the calls that are timed.
                failures = self.group.gather_objects(f"try {tag}", self._try(config, inp, total))
                if not any(failures):
                    times = self.group.gather_objects(f"time {tag}", self._time(config, inp))
                    results.append((max(times), config))
        return min(results)[1] if results else None

    def _try(self, config: tuple[str, int, int], inp: torch.Tensor, total: int) -> str | None:
        """What went wrong with one call on this rank, or None."""
        assert self.context is not None
        name, blocks, threads = config
        out = torch.full_like(inp, -1)
        try:
            self.context.execute(name, inp, out, blocks, threads)
            return None if bool((out == total).all()) else "wrong sum"
        except (RuntimeError, ValueError) as error:
            return str(error)

    def _time(self, config: tuple[str, int, int], inp: torch.Tensor) -> float:
        """Microseconds a call on this rank."""
        assert self.context is not None
        context, (name, blocks, threads), out = self.context, config, torch.empty_like(inp)
        captured = context.captured
        try:
            return mscclpp_bench_time(lambda: context.execute(name, inp, out, blocks, threads))
        finally:
            context.captured = captured  # the graph of the benchmark is gone

    def _config(self, dtype: torch.dtype, nbytes: int) -> tuple[str, int, int]:
        """The measured winner of the next larger size that takes `nbytes`, else whatever does."""
        assert self.context is not None
        rows = self.tuned.get(dtype) or next(iter(self.tuned.values()))
        larger = [config for size, config in rows if size >= nbytes]
        for config in (*larger, *(config for _, config in reversed(rows))):
            if self.context.why_not(config[0], nbytes) is None:
                return config
        for name in _CANDIDATES:
            if self.context.why_not(name, nbytes) is None:
                return name, 0, 0
        raise InvalidArgumentError(
            f"mscclpp on rank {self.group.rank}: no algorithm takes {nbytes} bytes"
        )

    # -- running ------------------------------------------------------------------------------

    @property
    def disabled(self) -> bool:
        """True when it refused at open, was closed, or is switched off by change_state."""
        return super().disabled or not self._enabled

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
        assert self.context is not None and out is not None and inp is not None
        if op == "all_reduce":
            name, blocks, threads = self._config(inp.dtype, inp.nbytes)
        elif op == "all_gather":
            (blocks, threads), name = ALGORITHMS["fullmesh"].launches(0)[0], "fullmesh"
        else:
            raise CommunicatorError(f"mscclpp does not run {op!r}")
        # Addresses differ between ranks: they stage, and never choose.
        staged_inp = inp.clone() if inp.data_ptr() % 16 else inp
        staged_out = torch.empty_like(out) if out.data_ptr() % 16 else out
        self.context.execute(name, staged_inp, staged_out, blocks, threads)
        if staged_out is not out:
            out.copy_(staged_out)

    def should_mscclpp_allreduce(self, inp: torch.Tensor, op: ReduceOp = dist.ReduceOp.SUM) -> bool:
        """Whether all_reduce takes `inp`: by device, dtype and size alone, equal on all ranks."""
        return self._refuses(inp, op) is None

    def _refuses(self, inp: torch.Tensor, op: ReduceOp) -> str | None:
        if self.refusal is not None or self.capabilities is None:
            return str(self.refusal)
        if self.disabled:
            return "it is closed or switched off"
        if inp.device.type != self.device.type:
            return f"the tensor is on {inp.device}, and it works on {self.device}"
        if op != dist.ReduceOp.SUM:
            return f"it sums; {op} was asked for"
        if inp.dtype not in DTYPES:
            accepted = ", ".join(dtype_name(dtype) for dtype in DTYPES)
            return f"{dtype_name(inp.dtype)} is not one of {accepted}"
        if not 0 < inp.nbytes <= self.max_bytes or inp.nbytes % 16:
            return f"{inp.nbytes} bytes are not a positive multiple of 16 up to {self.max_bytes}"
        return None

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = dist.ReduceOp.SUM) -> torch.Tensor:
        """The sum of every rank's `tensor`, as a new tensor; RefusedError where it is not taken."""
        tensor = check_tensor("all_reduce", tensor, self.group.rank, "tensor")
        reason = self._refuses(tensor, op)
        if reason is not None:
            raise RefusedError(f"mscclpp all_reduce on rank {self.group.rank}: {reason}")
        tensor = tensor.contiguous()
        out = torch.empty_like(tensor)
        self.run("all_reduce", out, tensor)
        return out

    @contextlib.contextmanager
    def change_state(self, enable: bool | None = None) -> Iterator[None]:
        """A scope in which it is switched on or off (None: on), for should_mscclpp_allreduce.

        All ranks must do the same.
        """
        before, self._enabled = self._enabled, enable is None or enable
        try:
            yield
        finally:
            self._enabled = before
