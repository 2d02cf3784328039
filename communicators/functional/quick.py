"""The functional interface to the quantized all-reduce, by integer handle.

init_custom_qr, qr_get_handle, qr_open_handles, qr_all_reduce, qr_destroy and qr_max_size have the
arguments that sgl_kernel.allreduce and vLLM's ops give them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from ..backends.quick.quick_all_reduce import AREA
from ..bindings import collectives
from ..bindings.workspace import SharedBuffer
from ..errors import InvalidArgumentError
from ..groups.arguments import check_plain
from ..settings import Settings

#: quant_level of the kernel libraries: 0 none, 1 to 3 with 8, 6 and 4 bits.
_LEVELS = ("FP", "Q8", "Q6", "Q4")
_UNLIMITED = 1 << 62


@dataclass
class _Opened:
    rank: int
    world_size: int
    max_size: int
    buffer: SharedBuffer
    handle: int = 0


_opened: dict[int, _Opened] = {}  # what the integers mean
_numbers = itertools.count(1)


def _get(fa: int, call: str) -> _Opened:
    if fa not in _opened:
        raise InvalidArgumentError(f"{call}: {fa} is no open handle of init_custom_qr")
    return _opened[fa]


def init_custom_qr(rank: int, world_size: int, qr_max_size: int | None = None) -> int:
    """Takes this rank's buffer on the current device; a handle for the other functions. Local.

    Args:
        qr_max_size: bytes of the largest tensor that qr_all_reduce accepts; None: any.
    """
    if world_size not in (2, 4, 8) or not 0 <= rank < world_size:
        raise InvalidArgumentError(
            f"init_custom_qr(rank={rank}, world_size={world_size}): the world size is 2, 4 or 8 "
            "and the rank below it"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    buffer = SharedBuffer.allocate(collectives.load().quick_ar_bytes(AREA), device, rank)
    number = next(_numbers)
    most = _UNLIMITED if qr_max_size is None else qr_max_size
    _opened[number] = _Opened(rank, world_size, most, buffer)
    return number


def qr_get_handle(fa: int) -> torch.Tensor:
    """What the peers open this rank's buffer with: uint8 [64] on the CPU."""
    handle = _get(fa, "qr_get_handle").buffer.handle
    return torch.frombuffer(bytearray(handle), dtype=torch.uint8)


def qr_open_handles(fa: int, handles: list[torch.Tensor]) -> None:
    """Maps every rank's buffer, given the handles of all ranks in rank order. Local.

    The ranks must have met between this call and their first qr_all_reduce.
    """
    opened = _get(fa, "qr_open_handles")
    if len(handles) != opened.world_size or opened.handle:
        raise InvalidArgumentError(
            f"qr_open_handles on rank {opened.rank}: {len(handles)} handles were given; "
            f"{opened.world_size} are expected, once"
        )
    library = collectives.load()
    opened.buffer.map_peers([bytes(handle.cpu().tolist()) for handle in handles])
    with torch.cuda.device(opened.buffer.device):
        opened.handle = library.create_quick_ar(opened.buffer.pointers, opened.rank, AREA)
    timeout_s = Settings.from_environment().timeout_s
    library.gpu_set_timeout_ns(opened.handle, int(timeout_s * 1e9))


def qr_all_reduce(
    fa: int, inp: torch.Tensor, out: torch.Tensor, quant_level: int, cast_bf2half: bool = False
) -> None:
    """The sum of every rank's `inp` in `out`, on the current stream.

    Args:
        inp, out: contiguous, alike, fp16 or bf16; out may be inp.
        quant_level: 0 for all 16 bits, 1, 2, 3 for 8, 6 and 4.
        cast_bf2half: accepted and ignored: sums are in fp32, and a cast could overflow.
    """
    opened = _get(fa, "qr_all_reduce")
    where = f"qr_all_reduce on rank {opened.rank}"
    if not opened.handle:
        raise InvalidArgumentError(f"{where}: qr_open_handles must be called first")
    if not 0 <= quant_level < len(_LEVELS):
        raise InvalidArgumentError(f"{where}: quant_level={quant_level} is not one of 0 to 3")
    check_plain("qr_all_reduce", inp, opened.rank, "inp")
    check_plain("qr_all_reduce", out, opened.rank, "out")
    alike = inp.dtype is out.dtype and inp.numel() == out.numel()
    placed = inp.device == out.device == opened.buffer.device
    if not (alike and placed and inp.dtype in (torch.float16, torch.bfloat16)):
        raise InvalidArgumentError(
            f"{where}: inp {list(inp.shape)} of {inp.dtype} on {inp.device} and out "
            f"{list(out.shape)} of {out.dtype} on {out.device} must be alike, in fp16 or bf16, on "
            f"{opened.buffer.device}"
        )
    if not (inp.is_contiguous() and out.is_contiguous()) or inp.nbytes > opened.max_size:
        raise InvalidArgumentError(
            f"{where}: contiguous tensors of at most {opened.max_size} bytes are accepted; inp has "
            f"{inp.nbytes}"
        )
    library = collectives.load()
    library.check(
        library.quick_ar_all_reduce(
            opened.handle,
            collectives.CODECS.index(_LEVELS[quant_level]),
            collectives.DTYPES[inp.dtype],
            inp.data_ptr(),
            out.data_ptr(),
            inp.nbytes,
            torch.cuda.current_stream(opened.buffer.device).cuda_stream,
        )
    )


def qr_destroy(fa: int) -> None:
    """Ends a handle. What init_custom_qr and qr_open_handles took is freed, as soon as no CUDA
    graph that recorded a call exists any more; replays until then end at once."""
    opened = _get(fa, "qr_destroy")
    del _opened[fa]
    if opened.handle:
        collectives.load().end(opened.handle, opened.buffer.device, opened.buffer.close)
    else:
        opened.buffer.close()


def qr_max_size() -> int:
    """Bytes of the largest tensor that a handle with the default qr_max_size accepts."""
    return _UNLIMITED
