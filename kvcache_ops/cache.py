"""Writes into the paged KV cache.

Slots: ``slot_mapping`` is int64 ``[T]``; slot s is entry ``s % BS`` of block ``s // BS``. T is the
number of tokens: rows of the inputs past T are padding and ignored. A negative slot skips its
token. A slot past the cache is skipped too; with ``KVCACHE_OPS_CHECK_BOUNDS=1`` it raises. Two
tokens of one slot: which one stays is undefined.

kv_cache_dtype: ``auto``, ``float16`` and ``bfloat16`` copy (the cache has the dtype of the input);
``fp8`` and ``fp8_e4m3`` store e4m3fn values, ``fp8_e5m2`` e5m2 values, in a uint8 cache:
``code = round(fp32(x) / scale)``, saturated to the largest finite value, NaN kept.
"""

from __future__ import annotations

from torch import Tensor

from kvcache_ops._native import op, slot_op


def _slots(cache: Tensor) -> int:
    """Entries of a ``[NB, BS, ...]`` cache."""
    return cache.shape[0] * cache.shape[1] if cache.dim() > 1 else 0


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    interleaved_v: bool = False,
) -> None:
    """Write keys and values of T tokens into the packed paged cache.

    Args:
        key, value: ``[N >= T, H, D]``, fp32, fp16 or bf16; stride(0) free, rest contiguous.
        key_cache: ``[NB, H, D/x, BS, x]``, contiguous, written; x elements fill 16 bytes.
        value_cache: ``[NB, H, D, BS]``, contiguous, written; with ``interleaved_v`` its memory is
            ``[NB, H, BS/x, D, x]``.
        slot_mapping: int64 ``[T]``.
        kv_cache_dtype: see the module.
        k_scale, v_scale: fp32 ``[1]`` on the device; read only for fp8.

    Layout::

        K[b, h, d // x, off, d % x]        the 16 bytes of a token's d-chunk lie together
        V[b, h, d, off]                    the tokens of a block lie together
        V[b, h, off // x, d, off % x]      interleaved_v

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: the cache of W. Kwon et al., PagedAttention (arXiv:2309.06180).

    Example:
        >>> k = torch.arange(4.).view(1, 1, 4)
        >>> kc, vc, one = torch.zeros(1, 1, 1, 2, 4), torch.zeros(1, 1, 4, 2), torch.ones(1)
        >>> reshape_and_cache(k, k, kc, vc, torch.tensor([1]), "auto", one, one)
        >>> kc[0, 0, 0]
        tensor([[0., 0., 0., 0.],
                [0., 1., 2., 3.]])
    """
    slots = key_cache.shape[0] * key_cache.shape[3] if key_cache.dim() == 5 else 0
    slot_op("reshape_and_cache", key, slot_mapping, slots)(
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        kv_cache_dtype,
        k_scale,
        v_scale,
        interleaved_v,
    )


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Write keys and values of T tokens into a cache of logical shape ``[NB, BS, H, D]``.

    Args:
        key, value: ``[N >= T, H, D]``, fp32, fp16 or bf16; stride(0) free, rest contiguous. Any D.
        key_cache, value_cache: ``[NB, BS, H, D]``, D contiguous, each with block, page and head
            strides of its own, written.
        slot_mapping: int64 ``[T]``.
        kv_cache_dtype: see the module.
        k_scale, v_scale: one fp32 or, per head, H contiguous ones; both of one shape; read only
            for fp8.

    Layout: all are views of this one shape::

        NHD          torch.empty(NB, BS, H, D)
        HND          torch.empty(NB, H, BS, D).permute(0, 2, 1, 3)
        interleaved  torch.empty(NB, 2, BS, H, D)[:, 0] and [:, 1]

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: the paged cache of FlashAttention's ``flash_attn_with_kvcache``.

    Example:
        >>> k, one = torch.ones(2, 1, 2), torch.ones(1)
        >>> kc, vc = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2)
        >>> reshape_and_cache_flash(k, k, kc, vc, torch.tensor([3, -1]), "auto", one, one)
        >>> kc[0, :, 0, 0]
        tensor([0., 0., 0., 1.])
    """
    slot_op("reshape_and_cache_flash", key, slot_mapping, _slots(key_cache))(
        key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
    )


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    scale: Tensor,
    skip_scale: bool = False,
) -> None:
    """Write MLA cache entries: the latent of a token, then its rotary part.

    Args:
        kv_c: ``[N >= T, R]``, fp32, fp16 or bf16, stride(0) free.
        k_pe: ``[N, P]``, dtype of ``kv_c``, stride(0) free.
        kv_cache: ``[NB, BS, R + P]``, entries contiguous, strides 0 and 1 free, written.
        slot_mapping: int64 ``[T]``.
        kv_cache_dtype: see the module; ``fp8_ds_mla`` stores the 656-byte entry below.
        scale: fp32 ``[1]`` on the device; read only for fp8.
        skip_scale: store unscaled codes.

    Layout of an ``fp8_ds_mla`` entry (R = 512, P = 64 or 0, 16-bit inputs)::

        bytes   0..511   512 e4m3 codes, 4 tiles of 128
        bytes 512..527   4 fp32 scales, one per tile: 2^ceil(log2(max(amax / 448, 1e-4)))
        bytes 528..655   64 16-bit rotary values, as they came (zeros when P = 0)

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: DeepSeek-V2 (arXiv:2405.04434) for the latent; FlashMLA for the 656-byte entry.

    Example:
        >>> cache, one = torch.zeros(1, 2, 3), torch.ones(1)
        >>> c, pe = torch.tensor([[1., 2.]]), torch.tensor([[3.]])
        >>> concat_and_cache_mla(c, pe, cache, torch.tensor([1]), "auto", one)
        >>> cache[0]
        tensor([[0., 0., 0.],
                [1., 2., 3.]])
    """
    slot_op("concat_and_cache_mla", kv_c, slot_mapping, _slots(kv_cache))(
        kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale, skip_scale
    )


def concat_and_cache_mla_grouped(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache_ptrs: Tensor,
    slot_mapping: Tensor,
    block_size: int,
    block_stride: int,
    entry_stride: int,
    kv_scales: Tensor | None = None,
    kv_cache_dtype: str = "auto",
) -> None:
    """:func:`concat_and_cache_mla` for L layers at once.

    Args:
        kv_c, k_pe: bf16 ``[L, T, R]`` and ``[L, T, P]``, strides 0 and 1 free.
        kv_cache_ptrs: int64 ``[L]`` on the device of ``kv_c``: the base address of each cache.
        slot_mapping: int64 ``[L, T]``, any strides: ``[T]`` expanded to all layers too.
        block_size: entries of a block.
        block_stride, entry_stride: in elements of the cache.
        kv_scales: L fp32, contiguous, or None for 1.
        kv_cache_dtype: as in :func:`concat_and_cache_mla`, without ``fp8_ds_mla``.

    The addresses are the caller's word, and so is that every slot lies in its cache.

    Layout, in items of the cache::

        kv_cache_ptrs[l] + slot // block_size * block_stride + slot % block_size * entry_stride:
        | kv_c[l, t, 0 .. R - 1] | k_pe[l, t, 0 .. P - 1] |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: DeepSeek-V2 (arXiv:2405.04434).

    Example:
        >>> caches = torch.zeros(2, 1, 4, 3, dtype=torch.bfloat16)
        >>> ptrs = torch.tensor([caches[0].data_ptr(), caches[1].data_ptr()])
        >>> c = torch.ones(2, 1, 2, dtype=torch.bfloat16)
        >>> concat_and_cache_mla_grouped(c, c[..., :1].contiguous(), ptrs,
        ...                              torch.tensor([[0], [3]]), 4, 12, 3)
        >>> caches[:, 0, :, 0].int()
        tensor([[1, 0, 0, 0],
                [0, 0, 0, 1]], dtype=torch.int32)
    """
    op("concat_and_cache_mla_grouped", kv_c)(
        kv_c,
        k_pe,
        kv_cache_ptrs,
        slot_mapping,
        block_size,
        block_stride,
        entry_stride,
        kv_scales,
        kv_cache_dtype,
    )


def concat_and_cache_mla_rope_fused(
    positions: Tensor,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    kv_cache_dtype: str,
    kv_cache_scale: Tensor,
) -> None:
    """Rotate the rotary parts of query and key in place and write the MLA cache entries.

    Args:
        positions: int64 ``[N >= T]``.
        q_pe: ``[N, Hq, P]``, token and head strides free, rotated in place.
        k_pe: ``[N, P]``, rotated in place.
        kv_c: ``[N, R]``.
        cos_sin_cache: ``[max_position, P]``, cosines then sines. All five of one dtype: fp32, fp16
            or bf16.
        is_neox: pairs are ``(k, k + P/2)``, else ``(2k, 2k + 1)``.
        slot_mapping: int64 ``[T]``.
        kv_cache: ``[NB, BS, R + P]``, written with ``[kv_c | rotated k_pe]``.
        kv_cache_dtype: see the module; not ``fp8_ds_mla``.
        kv_cache_scale: fp32 ``[1]``; read only for fp8.

    Tokens with a negative slot, and those at and past T, are not rotated either.

    Layout of an entry::

        | kv_c[t, 0 .. R - 1] | rotated k_pe[t, 0 .. P - 1] |

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: DeepSeek-V2 (arXiv:2405.04434); RoFormer (arXiv:2104.09864).

    Example:
        >>> q, k = torch.tensor([[[1., 0.]]]), torch.tensor([[0., 1.]])
        >>> cos_sin, cache = torch.tensor([[0., 1.]]), torch.zeros(1, 1, 4)
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> concat_and_cache_mla_rope_fused(zero, q, k, torch.tensor([[5., 6.]]), cos_sin, True,
        ...                                 zero, cache, "auto", torch.ones(1))
        >>> q, cache
        (tensor([[[0., 1.]]]), tensor([[[ 5.,  6., -1.,  0.]]]))
    """
    slot_op("concat_and_cache_mla_rope_fused", kv_c, slot_mapping, _slots(kv_cache))(
        positions,
        q_pe,
        k_pe,
        kv_c,
        cos_sin_cache,
        is_neox,
        slot_mapping,
        kv_cache,
        kv_cache_dtype,
        kv_cache_scale,
    )


def indexer_k_quant_and_cache(
    k: Tensor, kv_cache: Tensor, slot_mapping: Tensor, quant_block_size: int, kv_cache_dtype: str
) -> None:
    """Quantize the indexer's keys to e4m3 with a scale per group and write them into their cache.

    Args:
        k: ``[N >= T, D]``, fp16 or bf16, contiguous.
        kv_cache: uint8 ``[NB, BS, D + 4 D / qb]``, blocks contiguous, stride(0) free, written.
        slot_mapping: int64 ``[T]``.
        quant_block_size: qb, one of 32, 64, 128, a divisor of D.
        kv_cache_dtype: the **scale format**: ``ue8m0`` (a power of two, stored as fp32), ``mxfp8``
            (its exponent byte, four times), ``fp32`` or ``auto`` (plain fp32).

    Layout of a block (not entry by entry)::

        BS * D           e4m3 codes, at off * D + d
        BS * 4 * D / qb  scale bytes, at (off * D / qb + group) * 4

    ``s = max(amax, 1e-4) / 448``; ``ue8m0`` and ``mxfp8`` take ``2^ceil(log2(s))``.

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: the indexer of DeepSeek-V3.2; OCP Microscaling Formats (MX) for ue8m0.

    Example:
        >>> cache = torch.zeros(1, 1, 132, dtype=torch.uint8)
        >>> k = torch.full((1, 128), 448., dtype=torch.bfloat16)
        >>> indexer_k_quant_and_cache(k, cache, torch.tensor([0]), 128, "fp32")
        >>> cache[0, 0, 0], cache[0, 0, 128:].view(torch.float32)
        (tensor(126, dtype=torch.uint8), tensor([1.]))
    """
    slot_op("indexer_k_quant_and_cache", k, slot_mapping, _slots(kv_cache))(
        k, kv_cache, slot_mapping, quant_block_size, kv_cache_dtype
    )
