"""Decode attention over a paged KV cache, and the merge of partial attention results."""

from __future__ import annotations

from torch import Tensor

from kvcache_ops._native import op


def paged_attention(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    *,
    out_lse: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Attention of one query token a sequence over its cached keys and values.

    Args:
        out: ``[S, Hq, D]``, dtype of ``query``, written.
        query: ``[S, Hq, D]``, fp32, fp16 or bf16; token stride free. Any D up to 256 that is a
            multiple of 8.
        key_cache: flash layout ``[NB, BS, Hkv, D]``, D contiguous, block, page and head strides
            free; or packed ``[NB, Hkv, D/x, BS, x]`` as :func:`reshape_and_cache` writes it.
        value_cache: flash ``[NB, BS, Hkv, D]`` with strides of its own, or packed
            ``[NB, Hkv, D, BS]``. ``Hq % Hkv == 0``.
        block_tables: int32 ``[>= S, M]``: physical blocks of each sequence.
        seq_lens: int32 ``[>= S]``: tokens of each sequence, the query's own included; 0 gives
            zeros.
        scale: factor of the dot products, usually ``D ** -0.5``.
        out_lse: fp32 ``[Hq, S]``, written: natural log of the sum of the exponentials; ``-inf``
            for an empty sequence.
        alibi_slopes: fp32 ``[Hq]``; adds ``slope * (t - n + 1)`` to the logit of token t of n.
        kv_cache_dtype: ``auto``, ``float16``, ``bfloat16``, ``fp8``, ``fp8_e4m3``, ``fp8_e5m2``.
        k_scale, v_scale: fp32 ``[1]`` on the device of the cache, read when the cache is fp8; None
            counts as 1.

    The split of long contexts over the machine is chosen inside; there is no limit on the length.
    A block outside the cache, or past the table, counts as no tokens and is never read.

    Layout: token t of sequence s is in block ``b = block_tables[s, t // BS]``, ``off = t % BS``::

        flash    key_cache[b, off, h]                  D elements together
        packed   key_cache[b, h, d // x, off, d % x]   value_cache[b, h, d, off]
        query head q attends to KV head q // (Hq / Hkv)

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: W. Kwon et al., PagedAttention (arXiv:2309.06180); T. Dao et al., Flash-Decoding.

    Example:
        >>> keys = torch.zeros(1, 8, 1, 8)
        >>> values = torch.arange(8.).view(1, 8, 1, 1).expand(1, 8, 1, 8).contiguous()
        >>> out, lse = torch.empty(1, 2, 8), torch.empty(2, 1)
        >>> table = torch.zeros(1, 1, dtype=torch.int32)
        >>> lens = torch.tensor([4], dtype=torch.int32)
        >>> paged_attention(out, torch.ones(1, 2, 8), keys, values, table, lens, 1.0, out_lse=lse)
        >>> out[0, 0, 0], lse[0]
        (tensor(1.5000), tensor([1.3863]))
    """
    op("paged_attention", query)(
        out,
        query,
        key_cache,
        value_cache,
        block_tables,
        seq_lens,
        scale,
        out_lse=out_lse,
        alibi_slopes=alibi_slopes,
        kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def paged_attention_v1(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    scale: float,
    block_tables: Tensor,
    seq_lens: Tensor,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: Tensor | None,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
) -> None:
    """Decode attention over the packed cache layout in one pass.

    Args:
        out: ``[S, Hq, D]``, dtype of ``query``, written.
        query: ``[S, Hq, D]``, fp32, fp16 or bf16, stride(0) free.
        key_cache: ``[NB, Hkv, D/x, BS, x]`` as :func:`reshape_and_cache` writes it, x elements in
            16 bytes; block and head strides are free.
        value_cache: ``[NB, Hkv, D, BS]``.
        num_kv_heads: Hkv; ``Hq % Hkv == 0``.
        scale: factor of the dot products.
        block_tables: int32 ``[>= S, M]``.
        seq_lens: int32 ``[>= S]``; 0 gives zeros.
        block_size: BS, one of 8, 16, 32. D is one of 32, 64, 80, 96, 112, 120, 128, 192, 256.
        max_seq_len: the largest of ``seq_lens``; nothing here limits it.
        alibi_slopes: fp32 ``[Hq]`` or None: ``+ slope * (t - n + 1)``.
        kv_cache_dtype, k_scale, v_scale: as in :func:`reshape_and_cache`.
        tp_rank, blocksparse_*: block-sparse attention, on when ``blocksparse_vert_stride > 1``:
            key block ``kb = t // blocksparse_block_size`` attends when
            ``(kb + off) % vert_stride == 0`` or ``kb > (n - 1) // block_size - local_blocks``, with
            ``off = (tp_rank * Hq + h) * step + 1`` (step < 0: the KV head's index with -step).

    ``p = exp(a - max) / (sum + 1e-6)``; values past the sequence count as 0 whatever they hold.

    Layout: token t of sequence s is in block ``b = block_tables[s, t // BS]``, ``off = t % BS``::

        key_cache[b, h, d // x, off, d % x]   value_cache[b, h, d, off]

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: W. Kwon et al., PagedAttention (arXiv:2309.06180).

    Example:
        >>> keys, values = torch.zeros(1, 1, 8, 8, 4), torch.zeros(1, 1, 32, 8)
        >>> values[..., :4] = torch.arange(4.)
        >>> out, one = torch.empty(1, 1, 32), torch.ones(1)
        >>> table = torch.zeros(1, 1, dtype=torch.int32)
        >>> lens = torch.tensor([4], dtype=torch.int32)
        >>> paged_attention_v1(out, torch.ones(1, 1, 32), keys, values, 1, 1.0, table, lens, 8, 4,
        ...                    None, "auto", one, one)
        >>> out[0, 0, 0]
        tensor(1.5000)
    """
    op("paged_attention_v1", query)(
        out,
        query,
        key_cache,
        value_cache,
        num_kv_heads,
        scale,
        block_tables,
        seq_lens,
        block_size,
        max_seq_len,
        alibi_slopes,
        kv_cache_dtype,
        k_scale,
        v_scale,
        tp_rank,
        blocksparse_local_blocks,
        blocksparse_vert_stride,
        blocksparse_block_size,
        blocksparse_head_sliding_step,
    )


def paged_attention_v2(
    out: Tensor,
    exp_sums: Tensor,
    max_logits: Tensor,
    tmp_out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    scale: float,
    block_tables: Tensor,
    seq_lens: Tensor,
    block_size: int,
    max_seq_len: int,
    alibi_slopes: Tensor | None,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
    tp_rank: int = 0,
    blocksparse_local_blocks: int = 0,
    blocksparse_vert_stride: int = 0,
    blocksparse_block_size: int = 64,
    blocksparse_head_sliding_step: int = 0,
) -> None:
    """Decode attention in partitions of 512 tokens, merged at the end.

    Args:
        out: ``[S, Hq, D]``, written.
        exp_sums: fp32 ``[S, Hq, P]``, ``P >= ceil(max_seq_len / 512)``; the sums of a partition.
        max_logits: fp32 ``[S, Hq, P]``; the largest logit of a partition.
        tmp_out: ``[S, Hq, P, D]``, dtype of ``query``; the result of each partition. Entries of
            partitions past the sequence are not written.

    The others are those of :func:`paged_attention_v1`.

    ``out = sum_j tmp_j w_j / (sum_j w_j + 1e-6)`` with ``w_j = exp_sums_j exp(max_j - max)``; a
    single partition is copied.

    Layout::

        sequence   | tokens 0 .. 511 | 512 .. 1023 | ...
        tmp_out    [s, q, 0]         | [s, q, 1]   | ...   exp_sums and max_logits likewise

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: W. Kwon et al., PagedAttention (arXiv:2309.06180); T. Dao et al., Flash-Decoding.

    Example:
        >>> keys, values = torch.zeros(1, 1, 8, 8, 4), torch.zeros(1, 1, 32, 8)
        >>> values[..., :4] = torch.arange(4.)
        >>> out, one = torch.empty(1, 1, 32), torch.ones(1)
        >>> sums, largest = torch.empty(1, 1, 1), torch.empty(1, 1, 1)
        >>> tmp = torch.empty(1, 1, 1, 32)
        >>> table = torch.zeros(1, 1, dtype=torch.int32)
        >>> lens = torch.tensor([4], dtype=torch.int32)
        >>> paged_attention_v2(out, sums, largest, tmp, torch.ones(1, 1, 32), keys, values, 1, 1.0,
        ...                    table, lens, 8, 4, None, "auto", one, one)
        >>> out[0, 0, 0], sums
        (tensor(1.5000), tensor([[[4.]]]))
    """
    op("paged_attention_v2", query)(
        out,
        exp_sums,
        max_logits,
        tmp_out,
        query,
        key_cache,
        value_cache,
        num_kv_heads,
        scale,
        block_tables,
        seq_lens,
        block_size,
        max_seq_len,
        alibi_slopes,
        kv_cache_dtype,
        k_scale,
        v_scale,
        tp_rank,
        blocksparse_local_blocks,
        blocksparse_vert_stride,
        blocksparse_block_size,
        blocksparse_head_sliding_step,
    )


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Tensor | None = None,
) -> None:
    """Combine the attention over a prefix with that over a suffix of the same context.

    The order of the arguments is that of Python callers; the schema's is
    ``(output, output_lse, prefix_output, prefix_lse, suffix_output, suffix_lse, ...)``.

    Args:
        output: ``[N, H, D]``, fp32, fp16 or bf16, or e4m3 codes (uint8 or float8_e4m3fn) with
            ``output_scale``; written. May be ``prefix_output`` itself.
        prefix_output, suffix_output: ``[N, H, D]``, last dimension contiguous, other strides free.
        prefix_lse, suffix_lse: fp32 ``[H, N]``, any strides, **natural log**. Libraries that keep
            the base-2 logarithm (FlashInfer) must be multiplied by ln 2 first.
        output_lse: fp32 ``[H, N]``, written when given. May be ``prefix_lse`` itself.
        prefill_tokens_with_context: tokens at and past this index have no prefix: they copy the
            suffix. None: all have one.
        output_scale: fp32 ``[1]``: the result times ``1 / output_scale``, stored as e4m3.

    ``m = max(p, s); a, b = e^(p - m), e^(s - m); out = pre a/(a+b) + suf b/(a+b);
    lse = log(a + b) + m``. An LSE of +inf counts as -inf; when both are -inf the prefix output
    (expected to be 0) is passed on and the lse is -inf.

    Layout::

        outputs   [N, H, D]   token, head, element; the last contiguous
        LSEs      [H, N]      head, token

    Raises:
        RuntimeError: an argument has a shape, dtype, device or stride that is not accepted.

    Source: Z. Ye et al., FlashInfer (arXiv:2501.01005), section 2.2.

    Example:
        >>> out, zero = torch.empty(1, 1, 2), torch.zeros(1, 1)
        >>> a, b = torch.tensor([[[1., 3.]]]), torch.tensor([[[3., 5.]]])
        >>> merge_attn_states(out, a, zero, b, zero)
        >>> out
        tensor([[[2., 4.]]])
    """
    op("merge_attn_states", output)(
        output=output,
        output_lse=output_lse,
        prefix_output=prefix_output,
        prefix_lse=prefix_lse,
        suffix_output=suffix_output,
        suffix_lse=suffix_lse,
        prefill_tokens_with_context=prefill_tokens_with_context,
        output_scale=output_scale,
    )
