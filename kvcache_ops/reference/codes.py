"""The fp8 values of the reference: quantized and restored with torch's own float8 types."""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# The largest finite values of the OCP 8-bit formats (Open Compute Project, OFP8, revision 1.0).
_FP8 = {"e4m3": (torch.float8_e4m3fn, 448.0), "e5m2": (torch.float8_e5m2, 57344.0)}


_KINDS = {
    "auto": None,
    "float16": None,
    "bfloat16": None,
    "fp8": "e4m3",
    "fp8_e4m3": "e4m3",
    "fp8_ds_mla": "e4m3",
    "fp8_e5m2": "e5m2",
}


def fp8_kind(kv_cache_dtype: str) -> str | None:
    """None for a copy, else "e4m3" or "e5m2"."""
    return _KINDS[kv_cache_dtype]


def quantize(x: Tensor, scale: Tensor | float, kind: str | None) -> Tensor:
    """uint8 codes of ``x / scale``: rounded to nearest even, saturated; NaN stays NaN.

    The sign bit is that of the quotient for a NaN too. ``kind`` None returns x as it is.
    """
    if kind is None:
        return x
    dtype, largest = _FP8[kind]
    quotient = x.float() / scale
    codes = quotient.clamp(-largest, largest).to(dtype).view(torch.uint8)
    # Of the bits: torch's conversion of a half that is NaN keeps its sign only in whole vectors.
    sign = x.view({2: torch.int16, 4: torch.int32}[x.itemsize]) < 0
    if isinstance(scale, Tensor):
        sign = sign ^ torch.signbit(scale)
    nan = torch.where(sign, 0xFF, 0x7F).to(torch.uint8)
    return torch.where(quotient.isnan(), nan, codes)


def dequantize(
    codes: Tensor, scale: Tensor | float, kind: str | None, dtype: torch.dtype
) -> Tensor:
    """``round_to_dtype(fp32(half(code)) * scale)``; ``kind`` None returns the input as it is."""
    if kind is None:
        return codes
    half = codes.view(_FP8[kind][0]).to(torch.float16)
    return (half.float() * scale).to(dtype)
