"""Gathers out of the paged KV cache into dense tensors.

A block of the table that lies outside the cache, or a token past the table, leaves its row alone.
``block_table`` and ``seq_starts`` may have more rows than there are sequences, as those of a padded
batch have: the rest is not read.
"""

from __future__ import annotations

from torch import Tensor

from kvcache_ops._native import op


def gather_and_maybe_dequant_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    token_to_seq: Tensor,
    num_tokens: int,
    kv_cache_dtype: str,
    scale: Tensor,
    seq_starts: Tensor | None = None,
) -> None:
    """Gather the MLA entries of many sequences into one dense tensor, dequantizing fp8.

    Args:
        src_cache: ``[NB, BS, E]``, entries contiguous, strides 0 and 1 free.
        dst: ``[>= num_tokens, E]``, stride(0) free, written.
        block_table: int32 ``[>= B, M]``.
        cu_seq_lens: int32 ``[B + 1]``: the rows of sequence b are ``cu[b] .. cu[b + 1]``.
        token_to_seq: int32 ``[num_tokens]``: the sequence of each row.
        num_tokens: rows to write at most.
        kv_cache_dtype: see the module. A copy is bit for bit.
        scale: fp32 ``[1]``; read only for fp8.
        seq_starts: int32 ``[>= B]``: the first token of each sequence to gather; None for 0.

    Row ``cu[b] + i`` receives token ``p = seq_starts[b] + i``: entry ``p % BS`` of block
    ``block_table[b, p // BS]``. A block past the table or outside the cache leaves its row alone.

    Layout::

        dst   | sequence 0: cu[0] .. cu[1] - 1 | sequence 1: cu[1] .. cu[2] - 1 | ...
        token p of sequence b is src_cache[block_table[b, p // BS], p % BS]

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: DeepSeek-V2 (arXiv:2405.04434); the paging of PagedAttention (arXiv:2309.06180).

    Example:
        >>> cache = torch.arange(8.).view(2, 2, 2)
        >>> dst, i32 = torch.zeros(3, 2), torch.int32
        >>> gather_and_maybe_dequant_cache(
        ...     cache, dst, torch.tensor([[1, 0]], dtype=i32), torch.tensor([0, 3], dtype=i32),
        ...     torch.zeros(3, dtype=i32), 3, "auto", torch.ones(1))
        >>> dst[:, 0]
        tensor([4., 6., 0.])
    """
    op("gather_and_maybe_dequant_cache", src_cache)(
        src_cache,
        dst,
        block_table,
        cu_seq_lens,
        token_to_seq,
        num_tokens,
        kv_cache_dtype,
        scale,
        seq_starts,
    )


def cp_gather_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    batch_size: int,
    seq_starts: Tensor | None = None,
) -> None:
    """Gather cache entries of many sequences into one dense tensor, as bytes.

    Args:
        src_cache: ``[NB, BS, ...]``, any entry shape with entries contiguous, strides 0 and 1
            free; items of 1, 2 or 4 bytes.
        dst: ``[T, ...]``, the entry shape and dtype of ``src_cache``, stride(0) free, written.
        block_table: int32 ``[>= B, M]``.
        cu_seq_lens: int32 ``[B + 1]``.
        batch_size: B.
        seq_starts: int32 ``[>= B]`` or None, as in :func:`gather_and_maybe_dequant_cache`.

    Rows at and past ``cu_seq_lens[B]`` stay; so do rows whose block is past the table or outside
    the cache.

    Layout::

        dst   | sequence 0: cu[0] .. cu[1] - 1 | sequence 1: cu[1] .. cu[2] - 1 | ...
        token p of sequence b is src_cache[block_table[b, p // BS], p % BS]

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: the paging of W. Kwon et al., PagedAttention (arXiv:2309.06180).

    Example:
        >>> cache, dst, i32 = torch.arange(4.).view(2, 2, 1), torch.zeros(2, 1), torch.int32
        >>> table, cu = torch.tensor([[1]], dtype=i32), torch.tensor([0, 2], dtype=i32)
        >>> cp_gather_cache(cache, dst, table, cu, 1)
        >>> dst.flatten()
        tensor([2., 3.])
    """
    op("cp_gather_cache", src_cache)(
        src_cache, dst, block_table, cu_seq_lens, batch_size, seq_starts
    )


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    workspace_starts: Tensor,
    batch_size: int,
    seq_starts: Tensor | None = None,
    host_cache: Tensor | None = None,
    host_row_ids: Tensor | None = None,
    device_row_ids: Tensor | None = None,
) -> None:
    """Gather ``fp8_ds_mla`` entries and turn them into bf16.

    Args:
        src_cache: uint8 or float8_e4m3fn ``[NB, BS, 656]``, entries contiguous.
        dst: bf16 ``[T, 576]``, contiguous, written.
        block_table: int32 ``[>= B, M]``.
        workspace_starts: int32 ``[>= B]``: the first row of each request; the last one ends at T.
        batch_size: B.
        seq_starts: int32 ``[>= B]`` or None.
        host_cache: pinned contiguous uint8 ``[rows, 656]``: entries that live on the host.
        host_row_ids, device_row_ids: int32 ``[NB' * BS]`` or ``[NB', BS]``: where logical entry
            ``id = block * BS + offset`` lies: row ``device_row_ids[id]`` of ``src_cache`` when that
            is >= 0, else row ``host_row_ids[id]`` of ``host_cache``. The three come together.

    ``row[0:512] = bf16(fp32(code) * scale of its tile)``; ``row[512:576]`` the rotary bits, which
    are taken for bf16.

    Layout::

        entry, bytes   | 512 codes in 4 tiles of 128 | 4 fp32 scales | 64 rotary bf16 |
        row, bf16      | 512 values                                  | 64 rotary      |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: the FP8 cache of FlashMLA.

    Example:
        >>> cache, one = torch.zeros(1, 1, 656, dtype=torch.uint8), torch.ones(1)
        >>> c = torch.full((1, 512), 3., dtype=torch.bfloat16)
        >>> concat_and_cache_mla(c, c[:, :64], cache, torch.tensor([0]), "fp8_ds_mla", one)
        >>> dst, zero = torch.empty(1, 576, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
        >>> cp_gather_and_upconvert_fp8_kv_cache(cache, dst, zero.view(1, 1), zero, 1)
        >>> bool((dst == 3).all())
        True
    """
    op("cp_gather_and_upconvert_fp8_kv_cache", src_cache)(
        src_cache,
        dst,
        block_table,
        workspace_starts,
        batch_size,
        seq_starts,
        host_cache,
        host_row_ids,
        device_row_ids,
    )


def cp_gather_indexer_k_quant_cache(
    kv_cache: Tensor, dst_k: Tensor, dst_scale: Tensor, block_table: Tensor, cu_seq_lens: Tensor
) -> None:
    """Gather codes and scales of many sequences out of the indexer's cache.

    Args:
        kv_cache: uint8 ``[NB, BS, D + 4 D / qb]`` as :func:`indexer_k_quant_and_cache` writes it.
        dst_k: ``[T, D]`` of one-byte items, contiguous, written; ``D % 16 == 0``.
        dst_scale: ``[T, 4 D / qb]`` bytes (or ``[T, D / qb]`` fp32), contiguous, written.
        block_table: int32 ``[>= B, M]``.
        cu_seq_lens: int32 ``[B + 1]``.

    Rows at and past ``cu_seq_lens[B]`` stay as they are.

    Layout::

        block of kv_cache   | BS * D codes | BS * 4 * D / qb scale bytes |
        dst_k[row]          | D codes of one token |
        dst_scale[row]      | 4 * D / qb scale bytes of the same token |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: the indexer of DeepSeek-V3.2.

    Example:
        >>> cache = torch.zeros(1, 1, 132, dtype=torch.uint8)
        >>> k = torch.full((1, 128), 448., dtype=torch.bfloat16)
        >>> indexer_k_quant_and_cache(k, cache, torch.tensor([0]), 128, "fp32")
        >>> u8, i32 = torch.uint8, torch.int32
        >>> dst, scale = torch.zeros(1, 128, dtype=u8), torch.zeros(1, 4, dtype=u8)
        >>> table, cu = torch.zeros(1, 1, dtype=i32), torch.tensor([0, 1], dtype=i32)
        >>> cp_gather_indexer_k_quant_cache(cache, dst, scale, table, cu)
        >>> dst[0, 0], scale.view(torch.float32)
        (tensor(126, dtype=torch.uint8), tensor([[1.]]))
    """
    op("cp_gather_indexer_k_quant_cache", kv_cache)(
        kv_cache, dst_k, dst_scale, block_table, cu_seq_lens
    )
