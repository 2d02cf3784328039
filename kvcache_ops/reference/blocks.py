"""Blocks moved and converted, in plain torch."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvcache_ops.reference.codes import dequantize, fp8_kind, quantize


def swap_blocks(src: Tensor, dst: Tensor, block_size_in_bytes: int, block_mapping: Tensor) -> None:
    def bytes_of(t: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=torch.uint8, device=t.device)
        return whole.set_(
            t.untyped_storage(), t.storage_offset() * t.itemsize, (t.numel() * t.itemsize,), (1,)
        )

    src_bytes, dst_bytes, n = bytes_of(src), bytes_of(dst), block_size_in_bytes
    for s, d in block_mapping.tolist():
        dst_bytes[d * n : (d + 1) * n].copy_(src_bytes[s * n : (s + 1) * n])


def swap_blocks_batch(
    src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor, is_src_access_order_any: bool = False
) -> None:
    for s, d, n in zip(src_ptrs.tolist(), dst_ptrs.tolist(), sizes.tolist(), strict=True):
        ctypes.memmove(d, s, n)


def convert_fp8(output: Tensor, input: Tensor, scale: float = 1.0, kv_dtype: str = "fp8") -> None:
    kind = fp8_kind(kv_dtype)
    output, input = (t.as_strided((t.numel(),), (1,)) for t in (output, input))  # their memory
    # The host's double becomes fp32 once, as the kernels take it.
    fp32_scale = torch.tensor(scale, dtype=torch.float32, device=input.device)
    if output.dtype == torch.uint8:
        output.copy_(quantize(input, fp32_scale, kind))
    else:
        output.copy_(dequantize(input, fp32_scale, kind, output.dtype))
