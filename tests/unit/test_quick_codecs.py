"""The codecs of the quantized all-reduce: bounds, lost blocks, and the bits of the native ones."""

import pytest
import torch

from communicators.backends.quick import codecs as quick
from communicators.bindings import native
from communicators.errors import InvalidArgumentError

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
CODECS = pytest.mark.parametrize("codec", ["Q8", "Q6", "Q4"])
WORLDS = pytest.mark.parametrize("world_size", [2, 4, 8])


def hard_blocks(dtype):
    """fp32 [N, 32]: every size of number, heavy tails, ties, exact halves, inf and NaN."""
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(2000, 32, generator=generator)
    scales = torch.logspace(-44, 38, 2000)[:, None]
    uniform = torch.rand(500, 32, generator=generator) * 2 - 1
    heavy = torch.distributions.StudentT(1.5).sample((500, 32))
    steps = torch.arange(-128, 128).float().view(8, 32) / 2  # halves of a step of 1, for m = -64
    steps[:, 0] = -64
    tie = torch.zeros(4, 32)
    tie[0, 3], tie[0, 9] = 1, -1
    tie[1, 3], tie[1, 9] = -1, 1
    tie[2] = 7.5
    lost = torch.ones(6, 32)
    lost[0, 5], lost[1, 5], lost[2, 5] = torch.inf, -torch.inf, torch.nan
    lost[3, 5], lost[3, 30] = torch.inf, -torch.inf
    lost[4, 5], lost[4, 6] = torch.inf, torch.nan
    lost[5] = -torch.nan
    limits = torch.full((4, 32), torch.finfo(dtype).max)
    limits[1, 7] *= 1.001  # a sum beyond the dtype
    limits[2] *= -1
    limits[3] = torch.finfo(dtype).tiny / 3
    every16 = torch.arange(-32768, 32768).to(torch.int16).view(dtype).float().view(-1, 32)
    mixed = torch.randint(-32768, 32768, (2000, 32), generator=generator).to(torch.int16)
    # Words of nothing but the largest code, which the wire has to tell from an empty place.
    signs = (torch.rand(1000, 32, generator=generator) < 0.95).float() * -2 + 1
    signs[:, 8:16] = -1
    signs[-1], signs[-2, 24:], signs[-1, 5] = -1, -1, 1
    largest = [signs, signs * 0.75 + 0.25 * signs.sign().clamp(min=0), signs.flip(1)]
    blocks = [normal * scales, uniform, heavy, steps, tie, lost, limits, every16]
    blocks += [mixed.view(dtype).float(), *largest]
    return torch.cat([*blocks, normal.to(dtype).float()])


def unpacked(codes, bits):
    """int32 [N, 8] of the native encoder, a byte a code -> q int32 [N, 32]."""
    return codes.view(torch.uint8).int() - (1 << (bits - 1))


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@DTYPES
@CODECS
def test_the_model_and_the_native_functions_give_the_same_bits(dtype, codec):
    native.load("cpu")
    bits, x = quick.bits_of(codec), hard_blocks(dtype)
    m, q = quick.encode(x, bits, dtype)
    bfloat16 = dtype is torch.bfloat16
    native_m, codes = torch.ops.communicators.quick_encode(x, bits, bfloat16)
    assert same(native_m.view(dtype).float(), m.float())
    usable = m.isfinite()
    assert torch.equal(unpacked(codes, bits)[usable], q[usable])
    assert not codes[~usable].any()  # lost blocks send zeros, equal everywhere
    back = torch.ops.communicators.quick_decode(native_m, codes, bits, bfloat16)
    assert same(back, quick.decode(m, q, bits))
    assert q.min() >= -(1 << (bits - 1)) and q.max() == (1 << (bits - 1)) - 1


@DTYPES
@CODECS
def test_one_encoding_keeps_its_bound(dtype, codec):
    x = hard_blocks(dtype)
    x = x[x.isfinite().all(1) & (x.abs().amax(1) <= torch.finfo(dtype).max)]
    m = quick.extremes(x, dtype).float()
    step = (m.abs() / (1 << (quick.bits_of(codec) - 1)))[:, None]
    assert (m.abs() >= x.abs().amax(1))[m != 0].all()
    error = (quick.roundtrip(x, codec, dtype) - x).abs()
    clamped = x * -m.sign()[:, None] > m.abs()[:, None] - step / 2
    allowed = torch.where(clamped, 1.0, 0.5) * step * (1 + 2**-15)
    zeroed = (m == 0)[:, None]
    assert torch.where(zeroed, error <= 2.0**-118, error <= allowed).all()
    assert (error > 0.49 * step)[m != 0].any()  # the bound is reached
    # In a tensor of the dtype, an extreme value and a constant block are exact.
    own = x.to(dtype).float()
    largest = own.abs().argmax(1)
    at = torch.arange(len(own))
    kept = quick.roundtrip(own, codec, dtype)[at, largest] == own[at, largest]
    tied = (own == -quick.extremes(own, dtype).float()[:, None]).any(1)
    assert (kept | tied | (own.abs().amax(1) < 2.0**-118)).all()


@DTYPES
@CODECS
def test_lost_blocks_stay_lost_and_alone(dtype, codec):
    x = torch.ones(4, 32)
    x[0, 3], x[1, 3], x[2, 3] = torch.inf, -torch.inf, torch.nan
    back = quick.roundtrip(x, codec, dtype)
    assert (back[0] == torch.inf).all() and (back[1] == -torch.inf).all() and back[2].isnan().all()
    assert torch.equal(back[3], x[3])
    too_large = torch.full((1, 32), torch.finfo(dtype).max) * 1.01
    assert (quick.roundtrip(too_large, codec, dtype) == torch.inf).all()


def activations(kind, shape, generator):
    """Data like a layer's output: see docs/quick_all_reduce.md."""
    x = torch.randn(shape, generator=generator)
    if kind == "heavy tails":
        x = x / (torch.randn((3, *shape), generator=generator) ** 2).mean(0).sqrt()  # t, 3 degrees
    if kind == "outlier channels":
        x[:, ::128] *= 60
    return x


@WORLDS
@DTYPES
@pytest.mark.parametrize("codec", list(quick.CODECS))
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outlier channels"])
def test_an_all_reduce_keeps_its_bound(world_size, dtype, codec, kind):
    generator = torch.Generator().manual_seed(world_size)
    inputs = [activations(kind, (9, 2049), generator).to(dtype) for _ in range(world_size)]
    out = quick.all_reduce(inputs, codec)
    assert out.dtype == dtype and out.shape == inputs[0].shape
    exact = torch.stack(inputs).double().sum(0)
    error, bound = (out.double() - exact).abs(), quick.error_bound(inputs, codec)
    assert (error <= bound).all()
    assert (error / bound).max() > 0.2
    if codec == "FP":
        total = inputs[0].float()
        for x in inputs[1:]:
            total = total + x.float()
        assert torch.equal(out, total.to(dtype))


def test_inf_and_nan_of_one_rank_reach_the_sum():
    inputs = [torch.ones(64, dtype=torch.bfloat16) for _ in range(2)]
    inputs[1][3], inputs[0][40] = torch.inf, torch.nan
    out = quick.all_reduce(inputs, "Q4")
    assert (out[:32] == torch.inf).all() and out[32:].isnan().all()


def test_sizes_on_the_wire_and_unknown_codecs():
    assert [quick.wire_bytes(c, 64) for c in quick.CODECS] == [128, 68, 52, 36]
    with pytest.raises(InvalidArgumentError, match="codec 'Q5' is not one of FP, Q8, Q6, Q4"):
        quick.bits_of("Q5")
