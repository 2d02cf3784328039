"""The 8-bit formats: every code both ways, ties, saturation, subnormals, NaN; bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import kvcache_ops

FORMATS = [
    ("fp8", torch.float8_e4m3fn),
    ("fp8_e4m3", torch.float8_e4m3fn),
    ("fp8_e5m2", torch.float8_e5m2),
]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def value_of(code: int, fmt: torch.dtype) -> float:
    """The number a code stands for, from the definition of the format."""
    exponent_bits, mantissa_bits = (4, 3) if fmt == torch.float8_e4m3fn else (5, 2)
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    if exponent_bits == 4 and (code & 0x7F) == 0x7F:
        return math.nan
    if exponent_bits == 5 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal with NaN equal to NaN and -0 different from 0."""
    a, b = a.double(), b.double()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        torch.nan_to_num(1 / a, nan=7.0), torch.nan_to_num(1 / b, nan=7.0)
    )


@pytest.mark.parametrize(("kv_dtype", "fmt"), FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_decode_all_codes(kv_dtype: str, fmt: torch.dtype, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.full((256,), 3.0, dtype=dtype)
    kvcache_ops.convert_fp8(out, codes, 1.0, kv_dtype)
    expected = torch.tensor([value_of(c, fmt) for c in range(256)], dtype=torch.float64)
    assert same(out, expected.to(dtype))
    assert same(out, codes.view(fmt).float().to(dtype))


@pytest.mark.parametrize(("kv_dtype", "fmt"), FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_encode_all_codes(kv_dtype: str, fmt: torch.dtype, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.full((256,), 0x55, dtype=torch.uint8)
    x = codes.view(fmt).to(dtype)
    kvcache_ops.convert_fp8(out, x, 1.0, kv_dtype)
    expected = codes.clone()
    if fmt == torch.float8_e5m2:  # infinities saturate
        expected[0x7C], expected[0xFC] = 0x7B, 0xFB
    nan = x.isnan()  # torch's conversion to bf16 drops the sign of a NaN, so take that of x
    expected[nan] = torch.where(torch.signbit(x[nan]), 0xFF, 0x7F).to(torch.uint8)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("kv_dtype", "fmt"), FORMATS)
def test_ties_go_to_even_and_large_values_saturate(kv_dtype: str, fmt: torch.dtype) -> None:
    finite = sorted({v for c in range(128) if math.isfinite(v := value_of(c, fmt))})
    pairs = itertools.pairwise(finite)
    middle = torch.tensor([(a + b) / 2 for a, b in pairs], dtype=torch.float32)
    above = torch.nextafter(middle, torch.tensor(math.inf))
    below = torch.nextafter(middle, torch.tensor(0.0))
    codes = torch.arange(len(finite) - 1, dtype=torch.uint8)
    even = codes + (codes & 1)
    for x, expected in ((middle, even), (above, codes + 1), (below, codes)):
        for sign, bit in ((1.0, 0), (-1.0, 0x80)):
            out = torch.empty_like(codes)
            kvcache_ops.convert_fp8(out, sign * x, 1.0, kv_dtype)
            assert torch.equal(out, expected | bit)
    largest = finite[-1]
    big = torch.tensor([largest, largest * 1.01, largest * 1.2, 3e38, math.inf])
    out = torch.empty(5, dtype=torch.uint8)
    kvcache_ops.convert_fp8(out, big, 1.0, kv_dtype)
    assert (out == len(finite) - 1).all()
    kvcache_ops.convert_fp8(out, -big, 1.0, kv_dtype)
    assert (out == (len(finite) - 1) | 0x80).all()


@pytest.mark.parametrize(("kv_dtype", "fmt"), FORMATS)
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0123, 3.7, 1e-6, 1e30])
def test_random_floats_against_torch(kv_dtype: str, fmt: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (200_003,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[~x.isnan()]
    largest = torch.finfo(fmt).max
    s = torch.tensor(scale, dtype=torch.float32)
    expected = (x / s).clamp(-largest, largest).to(fmt).view(torch.uint8)
    out = torch.empty(x.numel(), dtype=torch.uint8)
    kvcache_ops.convert_fp8(out, x, scale, kv_dtype)
    assert torch.equal(out, expected)
    back = torch.empty_like(x)
    kvcache_ops.convert_fp8(back, out, scale, kv_dtype)
    assert torch.equal(back, out.view(fmt).half().float() * s)


@pytest.mark.parametrize(("kv_dtype", "fmt"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-20, 3e4])
def test_every_16_bit_float_against_torch(
    instruction_set: int, kv_dtype: str, fmt: torch.dtype, dtype: torch.dtype, scale: float
) -> None:
    """All 65536 of them: ties, subnormals, infinities and NaN with either sign among them."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    largest = torch.finfo(fmt).max
    quotient = x.float() / torch.tensor(scale, dtype=torch.float32)
    expected = quotient.clamp(-largest, largest).to(fmt).view(torch.uint8)
    nan = torch.where(bits < 0, 0xFF, 0x7F).to(torch.uint8)
    expected = torch.where(x.isnan(), nan, expected)
    out = torch.empty(x.numel(), dtype=torch.uint8)
    kvcache_ops.convert_fp8(out, x, scale, kv_dtype)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("kv_dtype", "fmt"), FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_code_with_a_scale(
    instruction_set: int, kv_dtype: str, fmt: torch.dtype, dtype: torch.dtype
) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256, dtype=dtype)
    kvcache_ops.convert_fp8(out, codes, 0.37, kv_dtype)
    expected = (codes.view(fmt).float() * torch.tensor(0.37, dtype=torch.float32)).to(dtype)
    assert same(out, expected)
