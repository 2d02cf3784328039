"""QuickAllReduce: the quantized all-reduce of large fp16 and bf16 tensors on 2, 4 or 8 GPUs.

docs/quick_all_reduce.md has the algorithm, the codecs and their errors; the protocol stands in
native/collectives/quick_all_reduce.h. It is used only when the user has allowed an error, by naming
a codec. All ranks hold the same bits, which depend on a value's position in the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist

from ...base import Capability, Communicator, Refusal, Splits, dtype_name
from ...bindings import collectives
from ...bindings.workspace import SharedBuffer
from ...errors import InvalidArgumentError, NativeLibraryError, RefusedError
from ...groups.arguments import check_in_place, check_tensor
from ...groups.group import Group
from ...groups.traced import order_tensor
from ...settings import Settings
from . import codecs as quick_codecs

WORLD_SIZES = (2, 4, 8)
DTYPES = (torch.float16, torch.bfloat16)

#: Bytes of one of the four areas of a rank's buffer: 72 MB and 32 KB in all.
AREA = 18 << 20

_ROCM_ARCHS = ("gfx942", "gfx950")


def qr_rocm_arch_available() -> bool:
    """Whether the current device is an AMD GPU that the kernels are compiled for."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return False
    name = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "gcnArchName", "")
    return any(name.startswith(arch) for arch in _ROCM_ARCHS)


class QuickAllReduce(Communicator):
    """All-reduce with Q8, Q6, Q4 or all 16 bits (FP) on the wire.

    Args:
        group: a Group, or a torch ProcessGroup that carries host objects (gloo, not NCCL).
        device: this rank's GPU: torch.device, "cuda:1" or an ordinal.
        codec: "FP", "Q8", "Q6" or "Q4"; default COMMUNICATORS_QUICK_CODEC. The same on all ranks.
        least_bytes: smallest tensor that it takes; default COMMUNICATORS_QUICK_LEAST_BYTES.

    Raises InvalidArgumentError for an NCCL group, a device that is not a GPU or an unknown codec.
    Everything else that keeps it from being used is in `refusal`. Collective.
    """

    name: ClassVar[str] = "quick_all_reduce"

    def __init__(
        self,
        group: Group | dist.ProcessGroup | None,
        device: torch.device | str | int,
        codec: str | None = None,
        least_bytes: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        if isinstance(group, dist.ProcessGroup) and dist.get_backend(group) == dist.Backend.NCCL:
            raise InvalidArgumentError(
                "QuickAllReduce(group): the group exchanges handles between host processes, so a "
                "gloo group is expected, not an NCCL group"
            )
        device = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
        if device.type != "cuda" or device.index is None:
            raise InvalidArgumentError(
                f"QuickAllReduce(device={device}): a GPU with its ordinal is expected (cuda:0)"
            )
        group = Group.of(group, settings)
        settings = settings if settings is not None else group.settings
        self.codec = settings.quick_codec if codec is None else codec
        if self.codec not in ("", *collectives.CODECS):
            raise InvalidArgumentError(
                f"QuickAllReduce(codec={self.codec!r}): it is one of "
                f"{', '.join(collectives.CODECS)}"
            )
        self.least_bytes = settings.quick_least_bytes if least_bytes is None else least_bytes
        self._library: collectives.Collectives | None = None
        self._buffer: SharedBuffer | None = None
        self._handle = 0
        super().__init__(group, device, settings)

    # -- the verbs ----------------------------------------------------------------------------

    def capability(self) -> Capability | Refusal:
        if not self.codec:
            return Refusal(
                "it rounds, and no codec was allowed (COMMUNICATORS_QUICK_CODEC, or "
                f"all_reduce_codec of initialize_model_parallel: {', '.join(collectives.CODECS)})"
            )
        if self.group.world_size not in WORLD_SIZES:
            return Refusal(f"world size {self.group.world_size} is not one of 2, 4, 8")
        if not torch.cuda.is_available():
            return Refusal("this process has no CUDA device")
        if torch.version.hip is not None:
            return Refusal("the kernels are compiled for ROCm in tests alone; no AMD GPU ran them")
        if torch.cuda.get_device_capability(self.device) < (8, 0):
            return Refusal(f"{torch.cuda.get_device_name(self.device)} is older than sm_80")
        try:
            self._library = collectives.load()
        except NativeLibraryError as error:
            return Refusal(str(error))
        return Capability(
            ops=frozenset({"all_reduce"}),
            dtypes=frozenset(DTYPES),
            modes=frozenset({"eager", "capture"}),
            min_bytes=self.least_bytes,
            deterministic=False,
            rounds=self._rounds(),
        )

    def _rounds(self) -> str:
        bits = quick_codecs.bits_of(self.codec)
        if bits == 16:  # all bits of a value travel
            return ""
        return f"{self.codec}, steps of 1/{1 << (bits - 1)} of the largest of 32 values, twice"

    def allocate(self) -> tuple[bytes, str]:
        return self.create_shared_buffer(), self.codec

    def rendezvous(self, handles: Sequence[tuple[bytes, str]]) -> None:
        assert self._buffer is not None and self._library is not None
        for rank, (_, codec) in enumerate(handles):
            if codec != self.codec:
                raise InvalidArgumentError(
                    f"rank {self.group.rank} has codec {self.codec} and rank {rank} {codec}"
                )
        self._buffer.map_peers([handle for handle, _ in handles])
        with torch.cuda.device(self.device):
            self._handle = self._library.create_quick_ar(
                self._buffer.pointers, self.group.rank, AREA
            )
        self._order = order_tensor(self.device)
        self.set_timeout(self.settings.timeout_s)

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
        assert out is not None and inp is not None
        if op != "all_reduce":
            raise InvalidArgumentError(f"{self.name} has no {op}")
        self._check_tensors(inp, out)
        codec = collectives.CODECS.index(self.codec)
        if torch.compiler.is_compiling():
            torch.ops.communicators.quick_all_reduce(self._handle, inp, out, codec, self._order)
            return
        assert self._library is not None
        self._library.check(
            self._library.quick_ar_all_reduce(
                self._handle,
                codec,
                collectives.DTYPES[inp.dtype],
                inp.data_ptr(),
                out.data_ptr(),
                inp.nbytes,
                torch.cuda.current_stream(self.device).cuda_stream,
            )
        )

    def release(self) -> None:
        library, handle, buffer = self._library, self._handle, self._buffer
        self._handle, self._buffer = 0, None
        if handle:
            assert library is not None
            library.end(handle, self.device, buffer.close if buffer is not None else None)
        elif buffer is not None:
            buffer.close()

    # -- what a user of QuickAllReduce in vLLM or SGLang calls ----------------------------------

    def init_quick_all_reduce(self) -> None:
        """Opens it again after close(); does nothing while it is live. Collective."""
        if self._handle:
            return
        self._closed = False
        self._open()

    def create_shared_buffer(self) -> bytes:
        """Takes this rank's buffer; returns the handle with which peers map it. Local."""
        assert self._library is not None
        nbytes = self._library.quick_ar_bytes(AREA)
        self._buffer = SharedBuffer.allocate(nbytes, self.device, self.group.rank)
        return self._buffer.handle

    def should_quick_allreduce(self, inp: torch.Tensor) -> bool:
        """Whether quick_all_reduce(inp) runs: live, fp16 or bf16, at least `least_bytes`.

        Only facts that are equal on all ranks; a tensor that is not contiguous is staged.
        """
        return (
            not self.disabled
            and inp.device == self.device
            and inp.dtype in DTYPES
            and inp.nbytes >= self.least_bytes
        )

    def quick_all_reduce(
        self, inp: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The sum over the ranks in `out` (new when None; may be inp), of any size.

        The error is bounded by quick_codecs.error_bound.
        """
        self.require_live()
        negated = False
        if not torch.compiler.is_compiling():
            inp = check_tensor("quick_all_reduce", inp, self.group.rank)
            if out is not None:
                check_in_place("quick_all_reduce", out, self.group.rank, "out")
                negated = out.is_neg()
        source = inp.contiguous()
        target = torch.empty_like(source) if out is None else out
        if negated or not target.is_contiguous():
            return target.copy_(self.quick_all_reduce(source))
        if source.numel():
            self.run("all_reduce", target, source)
        return target

    def set_timeout(self, seconds: float) -> None:
        """Deadline of the waits on the device, for calls from now on."""
        if not self._handle or self._library is None:
            raise RefusedError(f"{self.name} is not live on rank {self.group.rank}")
        self._library.gpu_set_timeout_ns(self._handle, int(seconds * 1e9))

    def check(self) -> None:
        """Raises what earlier calls reported from the device (CommTimeoutError, ...)."""
        self.require_live()
        assert self._library is not None
        self._library.gpu_check(self._handle)

    def __del__(self) -> None:
        # Never communicates. At interpreter exit the driver takes everything back by itself.
        if getattr(self, "_handle", 0) and torch.cuda.is_initialized():
            self.close()

    def _check_tensors(self, inp: torch.Tensor, out: torch.Tensor) -> None:
        if inp.device != self.device or out.device != self.device:
            raise InvalidArgumentError(
                f"all_reduce(x): x is on {inp.device} and the output on {out.device}; this "
                f"communicator of rank {self.group.rank} is bound to {self.device}"
            )
        if inp.dtype not in DTYPES or out.dtype is not inp.dtype or out.numel() != inp.numel():
            raise InvalidArgumentError(
                f"all_reduce(x): x is {list(inp.shape)} of {dtype_name(inp.dtype)} and the output "
                f"{list(out.shape)} of {dtype_name(out.dtype)}; alike in float16 or bfloat16 is "
                "accepted"
            )
        if not (inp.is_contiguous() and out.is_contiguous()):
            raise InvalidArgumentError("all_reduce(x): x and the output must be contiguous")
