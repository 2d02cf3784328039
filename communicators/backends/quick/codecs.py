"""The quantized all-reduce in plain torch: its block codecs, and the whole algorithm as a model.

native/collectives/quick_codec.h defines the codecs and their treatment of inf and NaN; the kernels
compile it. This is a second implementation, by torch's own arithmetic, that gives the same bits.
The kernels are tested against it; the errors in docs/quick_all_reduce.md are measured with it.

Bound on the error of one encoding: with m the extreme value of the block of 32, half a step of
|m| / 2^(b-1) for each value, one whole step for those within half a step of -m. (Plus 2^-15 of a
step for the one rounding of the quotient.) `error_bound` gives that of a whole all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import InvalidArgumentError

BLOCK = 32
#: Bits a value. "FP" sends the tensor's own 16 bits.
CODECS = {"FP": 16, "Q8": 8, "Q6": 6, "Q4": 4}

_ROW = 2048  # values: 256 threads of 8
_TILE_ROWS = 8
_SMALLEST = 2.0**-118
_SLACK = 2.0**-15


def bits_of(codec: str) -> int:
    """Bits a value of "FP", "Q8", "Q6" or "Q4"."""
    if codec not in CODECS:
        raise InvalidArgumentError(f"codec {codec!r} is not one of {', '.join(CODECS)}")
    return CODECS[codec]


def wire_bytes(codec: str, values: int) -> int:
    """Bytes that `values` (a multiple of 32) take on the wire in one encoding."""
    bits = bits_of(codec)
    return values * bits // 8 + (0 if codec == "FP" else values // BLOCK * 2)


def extremes(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """m of each block: fp32 x [N, 32] -> `dtype` [N]; inf or NaN for a block that is lost."""
    positive = torch.where(x > 0, x, 0).amax(1)
    negative = torch.where(x < 0, -x, 0).amax(1)
    m = torch.where(positive >= negative, positive, -negative)
    m = torch.where(m.abs() < _SMALLEST, 0, m)
    m = torch.where(positive.isinf() & negative.isinf() | x.isnan().any(1), torch.nan, m)
    rounded = m.to(dtype)
    # Away from zero: the next representable number where rounding went towards it.
    short = rounded.float().abs() < m.abs()
    return torch.where(short, (rounded.view(torch.int16) + 1).view(dtype), rounded)


def encode(x: torch.Tensor, bits: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 x [N, 32] -> (m [N] in `dtype`, q [N, 32] int32). `dtype`: fp16 or bf16."""
    m = extremes(x, dtype)
    most = 1 << (bits - 1)
    usable = m.isfinite() & (m != 0)
    # A tensor as dividend: torch computes number / tensor by a reciprocal, which is subnormal for
    # the largest m.
    dividend = torch.full_like(m, -most, dtype=torch.float32)
    inverse = torch.where(usable, dividend / torch.where(usable, m.float(), 1), 0)
    # The product of two fp32 numbers is exact in fp64, so this is one rounding, as the fma's.
    finite = torch.where(m.isfinite()[:, None], x, 0)
    quotient = (finite.double() * inverse.double()[:, None]).round()
    return m, quotient.clamp(max=most - 1).int()


def decode(m: torch.Tensor, q: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: fp32 [N, 32]; inf or NaN throughout for a block that is lost."""
    wide = m.float()[:, None]
    step = torch.where(wide.isfinite(), wide * (-1.0 / (1 << (bits - 1))), 0)
    return torch.where(wide.isfinite(), q.float() * step, wide)


def roundtrip(x: torch.Tensor, codec: str, dtype: torch.dtype) -> torch.Tensor:
    """What arrives, in fp32, of fp32 `x` (whole blocks) sent by ranks that hold `dtype`."""
    bits = bits_of(codec)
    if codec == "FP":
        return x.to(dtype).float()
    return decode(*encode(x.reshape(-1, BLOCK), bits, dtype), bits).reshape(x.shape)


def owners(numel: int, world_size: int) -> torch.Tensor:
    """The rank that sums each value of a flat tensor padded to whole tiles: [padded numel]."""
    tiles = -(-numel // (_ROW * _TILE_ROWS))
    rows = torch.arange(_TILE_ROWS) // (_TILE_ROWS // world_size)
    return rows.repeat_interleave(_ROW).repeat(tiles)


def all_reduce(inputs: Sequence[torch.Tensor], codec: str) -> torch.Tensor:
    """What the quantized two-shot all-reduce gives on every rank, bit for bit.

    Args:
        inputs: one fp16 or bf16 tensor per rank, of one shape and on one device, whichever it is.
    """
    dtype, numel, world_size = inputs[0].dtype, inputs[0].numel(), len(inputs)
    owner = owners(numel, world_size).to(inputs[0].device)
    total = torch.zeros(owner.numel(), device=owner.device)
    for rank, x in enumerate(inputs):
        wide = torch.zeros(owner.numel(), device=owner.device)
        wide[:numel] = x.flatten().float()
        # The owner adds its own part as it is; the others' parts were encoded.
        part = torch.where(owner == rank, wide, roundtrip(wide, codec, dtype))
        total = part if rank == 0 else total + part
    return roundtrip(total, codec, dtype)[:numel].to(dtype).reshape(inputs[0].shape)


def error_bound(inputs: Sequence[torch.Tensor], codec: str) -> torch.Tensor:
    """The largest |all_reduce(inputs) - exact sum|, value by value, in fp64; for finite input.

    One step a rank and one for the sum, |m| / 2^(b-1) each, with |m| the largest magnitude of the
    block; half of that for values that are not clamped. The sum's m is rounded up to the dtype, and
    the result rounded to it once. For "FP" only that last rounding.
    """
    dtype, numel = inputs[0].dtype, inputs[0].numel()
    info = torch.finfo(dtype)
    padded = torch.zeros(len(inputs), -(-numel // BLOCK) * BLOCK, dtype=torch.float64)
    for rank, x in enumerate(inputs):
        padded[rank, :numel] = x.flatten().double()
    total = padded.sum(0)
    error = torch.zeros_like(total)
    if codec != "FP":
        steps = 1 << (bits_of(codec) - 1)
        sent = padded.view(len(inputs), -1, BLOCK).abs().amax(2).sum(0)
        summed = total.view(-1, BLOCK).abs().amax(1)
        # What is encoded second already has the error of the first; its m is rounded up.
        first = sent / steps * (1 + _SLACK)
        second = ((summed + first) * (1 + info.eps) + info.smallest_normal) / steps * (1 + _SLACK)
        error = (first + second).repeat_interleave(BLOCK)
    rounding = (total.abs() + error) * (info.eps / 2 + 2.0**-20) + info.smallest_normal * info.eps
    return (error + rounding)[:numel].reshape(inputs[0].shape)
