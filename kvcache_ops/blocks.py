"""Whole blocks of the cache moved, or converted between floats and fp8 values."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcache_ops._native import gpu_batch_copy, op


def swap_blocks(src: Tensor, dst: Tensor, block_size_in_bytes: int, block_mapping: Tensor) -> None:
    """Copy whole cache blocks: for each row ``(s, d)`` block s of ``src`` to block d of ``dst``.

    Args:
        src: any tensor whose memory is a row of blocks; CPU or GPU.
        dst: likewise, written; CPU, the same GPU or another. Pinned CPU memory reaches link rate.
        block_size_in_bytes: bytes of one block, > 0.
        block_mapping: int64 ``[n, 2]`` on the CPU, any strides.

    The copies are queued on the current stream of the GPU among the two.

    Layout::

        src | block 0 | block 1 | ... | block s | ...    block_size_in_bytes each
        dst | block 0 | ... | block d | ...              block d becomes block s of src

    Raises:
        RuntimeError: a block lies outside its tensor, a source block overlaps a destination block,
            or an argument is not accepted; nothing has been copied then.

    Source: the swapping of W. Kwon et al., PagedAttention (arXiv:2309.06180), section 4.5.

    Example:
        >>> src, dst = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
        >>> swap_blocks(src, dst, 4, torch.tensor([[0, 1]]))
        >>> dst
        tensor([0, 0, 0, 0, 0, 1, 2, 3], dtype=torch.uint8)
    """
    where = dst if src.device.type == "cpu" else src
    op("swap_blocks", where)(src, dst, block_size_in_bytes, block_mapping)


def swap_blocks_batch(
    src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor, is_src_access_order_any: bool = False
) -> None:
    """Copy ``sizes[i]`` bytes from address ``src_ptrs[i]`` to ``dst_ptrs[i]``, as one batch.

    Args:
        src_ptrs, dst_ptrs, sizes: int64 ``[n]`` on the CPU, contiguous.
        is_src_access_order_any: the sources may be read at any time from the call on, not in
            stream order; only safe when nothing on the GPU is writing them.

    In a process that uses a GPU they are queued on the current stream of the current device. The
    addresses are the caller's word: they cannot be checked.

    Layout::

        src_ptrs[i] -> sizes[i] bytes
        dst_ptrs[i] <- the same bytes

    Raises:
        RuntimeError: the vectors differ in length, dtype or device, or a size is negative.

    Source: the batched copies of the CUDA driver (cuMemcpyBatchAsync).

    Example:
        >>> a, b = torch.arange(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
        >>> at = lambda t: torch.tensor([t.data_ptr()])
        >>> swap_blocks_batch(at(a), at(b), torch.tensor([2]))
        >>> b
        tensor([0, 1, 0, 0], dtype=torch.uint8)
    """
    copy = op("swap_blocks_batch", src_ptrs)
    if torch.cuda.is_initialized():  # some of the addresses may be a GPU's
        copy = gpu_batch_copy()
    copy(src_ptrs, dst_ptrs, sizes, is_src_access_order_any)


def convert_fp8(output: Tensor, input: Tensor, scale: float = 1.0, kv_dtype: str = "fp8") -> None:
    """Convert a cache between a float dtype and fp8 values.

    Args:
        output: as many elements as ``input``, written. The memory of each is without holes or
            repeated elements, in any order of dimensions (contiguous, or such a tensor permuted).
        input: one of the two is uint8 (codes), the other fp32, fp16 or bf16.
        scale: a float to codes divides by it, codes to a float multiply by it.
        kv_dtype: ``fp8``, ``fp8_e4m3`` or ``fp8_e5m2``.

    Memory is converted, so the shapes may differ: ``[NB, H, D/8, BS, 8]`` of bf16 and
    ``[NB, H, D/16, BS, 16]`` of codes. Where they are equal the strides are too, as
    ``torch.empty_like`` gives them, so that each element becomes the one at its own indices.

    Layout: item i of one memory is item i of the other::

        float  | x0          | x1          | ...
        uint8  | S EEEE MMM  | S EEEE MMM  | ...    e4m3; e5m2 is S EEEEE MM

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: Open Compute Project, 8-bit Floating Point Specification (OFP8).

    Example:
        >>> codes = torch.empty(3, dtype=torch.uint8)
        >>> convert_fp8(codes, torch.tensor([1., -2., 1e6]))
        >>> codes
        tensor([ 56, 192, 126], dtype=torch.uint8)
    """
    op("convert_fp8", input)(output, input, scale, kv_dtype)
